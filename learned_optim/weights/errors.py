"""The errors of weights. Every message names the culprit and says what to do."""


class WeightsError(ValueError):
    """Weights cannot be found, read, trusted, written or sent. Nothing was changed."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """Nothing has that name, path or Hub id, or the Hub is out of reach."""
