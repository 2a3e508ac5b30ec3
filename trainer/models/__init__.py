"""Public loaders of everything a Wan pipeline is made of.

Scripts and tests may rely on these four names (docs/architecture.md, public seams).
"""

from trainer.models.wan.image_encoder import load_image_encoder
from trainer.models.wan.loading import load_transformer
from trainer.models.wan.text_encoder import load_text_encoder
from trainer.models.wan.vae import load_vae

__all__ = ["load_image_encoder", "load_text_encoder", "load_transformer", "load_vae"]
