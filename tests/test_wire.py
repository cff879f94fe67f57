"""Reports on their way through Ray Tune."""

from numbers import Number

from tune.wire import packed, unpacked

VALUES = {"step": 10, "epsilon": 0.1 + 0.2, "status": "running", "fid": 1e6, "worst": float("inf")}


def test_a_report_arrives_as_it_was_sent() -> None:
    assert unpacked({"pid": 7, "trial_id": "x", **packed(VALUES)}) == VALUES


def test_tune_sees_no_number_to_remember() -> None:
    assert not [value for value in packed(VALUES).values() if isinstance(value, Number)]
