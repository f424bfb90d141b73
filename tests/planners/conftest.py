from tests.preprocessing.conftest import quick_listing, raw_root

__all__ = ["quick_listing", "raw_root"]
