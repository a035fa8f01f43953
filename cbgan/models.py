"""The networks that a configuration names."""

from torch import nn

from cbgan.config import GanConfig
from cbgan.networks.dcgan import Discriminator, Generator


def build_generator(cfg: GanConfig) -> Generator:
    """Make the generator; what torch's generator gives is drawn from it."""
    return Generator(cfg.width, cfg.latent_dim, cfg.norm, cfg.data.size, cfg.base_size, cfg.seed)


def build_networks(cfg: GanConfig) -> dict[str, nn.Module]:
    """Make generator "g" and discriminator "d"."""
    g = build_generator(cfg)
    return {"g": g, "d": Discriminator(cfg.width, cfg.data.size, g.num_classes, spectral=cfg.spectral)}
