"""MLflow that does not answer, as a command tells it: in one line, with what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from dpsink.errors import InputError
from tune import schema

REFUSALS = ("error code 401", "error code 403", "UNAUTHENTICATED", "PERMISSION_DENIED")  # of a proxy, and of MLflow


def advice_on(error: Exception, otherwise: str) -> str:
    """What to do about an error of MLflow: say who asks, where the server wants to know that."""
    refused = any(words in str(error) for words in REFUSALS)
    return "put user and password into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if refused else otherwise


@contextmanager
def told_when_lost(uri: str) -> Iterator[None]:
    """Turns an error of MLflow, or on the way to it, into one line without a password.

    Raises:
        InputError: that line.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:  # the second: of an artifact
        advice = advice_on(error, "see that its server is up, and repeat the command")
        raise InputError(
            f"MLflow at {schema.shown_uri(uri)} is lost: {schema.mlflow_reason(error, uri)}; {advice}"
        ) from None
