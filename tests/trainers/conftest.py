from tests.support.fixtures import build

__all__ = ["build"]
