"""A fourth application: a linear map learns digits from two streams, another one is learnt on its outputs."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from common.data import DataConfig, Stream, mirrored, plain
from common.norms import UCBNorm
from common.train.config import RunConfig
from common.train.loop import train
from common.train.task import Method, Tracked


@dataclass(frozen=True, kw_only=True)
class FourthConfig(RunConfig):
    data: DataConfig = field(default_factory=lambda: DataConfig(size=8))


class Fourth(Method[FourthConfig]):
    application, config, averaged = "fourth", FourthConfig, ("net",)

    @classmethod
    def tracked(cls, cfg):
        return {"loss/validation": Tracked("validation", "lower"), "loss/test": Tracked("test", "lower", True)}

    def streams(self):
        other = Stream(self.images["test"], self.cfg.batch_size // 2, (mirrored, plain))
        return super().streams() | {"other": other}

    def build(self):
        return {"net": nn.Sequential(UCBNorm(3, 2), nn.Flatten(), nn.Linear(192, 10)), "top": nn.Linear(10, 10)}

    def optimize(self, networks):
        return {name: torch.optim.SGD(net.parameters(), self.cfg.lr, fused=True) for name, net in networks.items()}

    def step(self, update):
        def loss(network, part, *views):
            logits, labels = (network(self.to_input(part["train"].images)), part["train"].labels)
            shown = [network(self.to_input(view)) for view in views]
            return F.cross_entropy(logits, labels) + (0.1 * F.mse_loss(*shown) if shown else 0)

        update.descend("net", lambda part: loss(self.wrapped["net"], part, *part["other"].views))
        update.descend("top", lambda part: loss(lambda x: self.wrapped["top"](self.networks["net"](x).detach()), part))

    @torch.no_grad()
    def evaluate(self, networks, moment):
        net, values = networks["net"].eval(), {}
        for split in sorted(self.images.keys() - {"train"}):
            moment.go_on()
            with self.env.buffers_of_first(net):
                logits = net(self.to_input(self.images[split].images))
            values[f"loss/{split}"] = float(F.cross_entropy(logits, self.images[split].labels))  # pyright: ignore[reportArgumentType]
        net.train()
        return values


def main(argv=None) -> None:
    train(Fourth, argv)
