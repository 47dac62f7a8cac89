"""Made-up parts of latency tables, for tests."""

from nas.table import Calibration, space_sha256
from supernet.space import SearchSpace

FORM = {"export": "made up"}  # in a table's meta: an export form of no runtime of this package, which none is measured against


def plain_calibration(space: SearchSpace) -> Calibration:
    """A calibration that leaves the sum of the rows as it is."""
    return Calibration(
        space=space.name,
        space_sha256=space_sha256(space),
        image_size=space.image_size,
        strides=space.strides,
        offset_ms=0.0,
        scale=1.0,
        scale_between=0.0,
        sum_low_ms=0.0,
        sum_high_ms=9.0,
        n_fit=16,
        n_check=12,
        mean_error_percent=1.0,
        max_error_percent=2.0,
        within_5_percent=100.0,
        within_10_percent=100.0,
        kendall_tau=1.0,
    )
