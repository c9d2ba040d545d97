"""Squeeze and excitation: every channel of an image times a number that the averages of all channels give."""

from restore_kernels.channel_gate.api import channel_gate

__all__ = ["channel_gate"]
