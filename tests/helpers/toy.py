"""The toy application: a linear map learns digits from two streams, another one is learnt on its outputs."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from common.data import DataConfig, Stream, mirrored, plain
from common.norms import UCBNorm
from common.train.config import RunConfig
from common.train.loop import train
from common.train.task import SelectionMetric, Task


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    data: DataConfig = field(default_factory=lambda: DataConfig(size=8))


def networks() -> dict[str, nn.Module]:
    return {"net": nn.Sequential(UCBNorm(3, 2), nn.Flatten(), nn.Linear(192, 10)), "top": nn.Linear(10, 10)}


class ToyTask(Task[ToyConfig]):
    application, config = "toy", ToyConfig

    def __init__(self, cfg, images, context):
        super().__init__(cfg, images, context, networks, evaluated=("net",))
        self.optimizers = {
            name: torch.optim.SGD(net.parameters(), cfg.lr, fused=True) for name, net in self.networks.items()
        }

    @classmethod
    def selection_metrics(cls, cfg):
        return {
            "loss/validation": SelectionMetric("validation", "lower"),
            "loss/test": SelectionMetric("test", "lower", True),
        }

    def streams(self):
        other = Stream(self.images["test"], self.cfg.batch_size // 2, (mirrored, plain))
        return super().streams() | {"other": other}

    def train_step(self, step):
        def loss(network, micro, *views):
            logits, labels = (network(self.to_input(micro["train"].images)), micro["train"].labels)
            shown = [network(self.to_input(view)) for view in views]
            return F.cross_entropy(logits, labels) + (0.1 * F.mse_loss(*shown) if shown else 0)

        net, top = (self.ddp_networks[name] for name in ("net", "top"))
        metrics = step.optimize("net", lambda micro: loss(net, micro, *micro["other"].views))
        return metrics | step.optimize("top", lambda m: loss(lambda x: top(self.networks["net"](x).detach()), m))

    @torch.no_grad()
    def evaluate(self, networks, context):
        net, values = networks["net"].eval(), {}
        for split in sorted(self.images.keys() - {"train"}):
            context.go_on()
            with self.env.buffers_of_first(net):
                logits = net(self.to_input(self.images[split].images))
            values[f"loss/{split}"] = float(F.cross_entropy(logits, self.images[split].labels))  # pyright: ignore[reportArgumentType]
        net.train()
        return values


def main(argv=None) -> None:
    train(ToyTask, argv)
