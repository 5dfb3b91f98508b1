"""posthoc: honest uncertainty for any pretrained vision model, after the fact."""

from importlib.metadata import version

from .adapters.errors import PosthocError

__version__ = version("posthoc")
__all__ = ["PosthocError"]
