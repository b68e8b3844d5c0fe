"""What can go wrong with weights. Every message names the culprit and says what to do."""


class WeightsError(ValueError):
    """Weights cannot be found, read, trusted, written or sent. Nothing was changed."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """Nothing answers to that name, path or Hub id, or it is out of reach now; others of the family may be usable."""
