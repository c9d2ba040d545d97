"""Complete networks for image restoration: training, restoring and evaluating them."""

from restore_nets.checkpoints import load_checkpoint, load_model, save_checkpoint
from restore_nets.models import create_model, list_models

__all__ = ["create_model", "list_models", "load_checkpoint", "load_model", "save_checkpoint"]
