"""The small vision transformer of the page of Keras that the paper follows, by timm."""

import math
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cbcls.networks.classifier import Classifier
from common.norms.config import NormConfig
from common.runtime.seeding import derive

_SIDE, _PATCH, _WIDTH = 72, 6, 64


class _Attention(Attention):
    """Heads of 64 values each, whatever the tokens' width; dropout of attention alone."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **(options | {"attn_head_dim": 64, "proj_drop": 0.0}))


class _Mlp(Mlp):
    """GELU after the second linear map, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.act(self.fc2(self.drop1(self.act(self.fc1(x))))))


class ViT(Classifier):
    """Eight transformer blocks on the 144 patches of an image brought to 72 x 72, and a wide head on all of them.

    The layer under test normalises the image before anything else; of kind bn it is the paper's ViT+BN. Without it and
    for 100 classes there are 21,759,012 parameters, 21,077,092 of them in the head.

    Args:
        num_classes: length of the output.
        norm: the layer under test, on the 3 channels of the images.
        seed: of the mixture's own generator; everything else is drawn from torch's global one.
        num_clusters: as for `Classifier`.

    Source: keras.io, "Image classification with Vision Transformer" (2021).
    """

    def __init__(self, num_classes: int, norm: NormConfig, *, seed: int = 0, num_clusters: int = 0) -> None:
        super().__init__(norm, num_clusters)
        self.norm = norm.build(3, derive(seed, "norm"))
        self.body = VisionTransformer(
            img_size=_SIDE,
            patch_size=_PATCH,
            num_classes=0,
            global_pool="",
            class_token=False,
            embed_dim=_WIDTH,
            depth=8,
            num_heads=4,
            mlp_ratio=2.0,
            proj_drop_rate=0.1,
            attn_drop_rate=0.1,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            attn_layer=_Attention,
            mlp_layer=_Mlp,
        )
        tokens = (_SIDE // _PATCH) ** 2
        self.head = nn.Sequential(
            nn.Flatten(),
            *(nn.Dropout(0.5), nn.Linear(tokens * _WIDTH, 2048), nn.GELU()),
            *(nn.Dropout(0.5), nn.Linear(2048, 1024), nn.GELU()),
            nn.Dropout(0.5),
        )
        self.end(1024, num_classes)
        # Weights are drawn as Keras does: Glorot's uniform ones, positions up to 0.05, biases 0.
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():  # Keras takes kernels of 64 x 4 heads x 64 for convolutions: fans 256 and 4,096
            if isinstance(module, _Attention):
                for maps, fans in ((module.qkv, 256 + 64 * 64), (module.proj, 256 + 256)):
                    nn.init.uniform_(maps.weight, -math.sqrt(6 / fans), math.sqrt(6 / fans))
        assert isinstance(self.body.pos_embed, Tensor)
        nn.init.uniform_(self.body.pos_embed, -0.05, 0.05)

    def features(self, x: Tensor, cluster: Tensor | None) -> Tensor:
        """Map images (N, 3, S, S) of any size to what the linear map is given, (N, 1024)."""
        x = self.normalised(self.norm, x, cluster)
        return self.head(self.body(F.interpolate(x, (_SIDE, _SIDE), mode="bilinear", align_corners=False)))
