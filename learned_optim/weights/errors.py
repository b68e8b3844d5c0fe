"""The one exception of this package: something is wrong with weights, and the message says what to do."""


class WeightsError(ValueError):
    """Weights cannot be found, read, trusted, written or sent. Nothing was changed."""
