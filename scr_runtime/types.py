"""Literal types of the public face."""

from typing import Literal

Mode = Literal["one-pass", "two-pass", "auto", "uniform", "off"]
