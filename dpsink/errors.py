"""The one exception for bad input: commands print it as one line and exit with code 2."""


class InputError(ValueError):
    """Input that a person can correct.

    The message is one line and gives the value, the rule and what to do, for example
    ``noise_multiplier=0 must be > 0; choose 0.5 or more``.
    """
