"""Loading and saving without other libraries' bars: a model of five small files needs none, and a run has a bar of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of diffusers and transformers inside; afterwards they are as the user had them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both = (diffusers_logging, transformers_logging)
    shown = [logging for logging in both if logging.is_progress_bar_enabled()]
    for logging in both:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()
