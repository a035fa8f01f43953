"""What settings of a run may be, to the ends of their ranges, and the line that refuses the next value."""

import math

from refused_settings import assert_refuses, assert_takes

from cbgan.config import GanConfig
from common.train.config import BestConfig, GuardConfig, RunConfig, ScheduleConfig

TINY = math.ulp(0.0)
BELOW_1 = math.nextafter(1.0, 0.0)

COUNTS = ("epochs", "grad_accum_steps", "log_every", "checkpoint_every", "evaluate_every", "steps_per_epoch")
MORE_THAN_0 = ("lr", "grad_clip_norm")
FROM_0 = ("seed", "threads", "weight_decay")
TAKEN = [
    *((RunConfig, {name: 1}) for name in COUNTS),
    *((RunConfig, {name: TINY}) for name in MORE_THAN_0),
    *((RunConfig, {name: 0}) for name in FROM_0),
    (GanConfig, {"evaluate_every": 0}),
    (RunConfig, {"batch_size": 2, "ema_decay": 0.0, "checkpoint_keep": [1, 7, 3]}),
    (RunConfig, {"ema_decay": BELOW_1}),
    (RunConfig, {"name": "a", "resume": True}),
    (RunConfig, {"name": "a.b", "resume": "auto"}),
    (ScheduleConfig, {"kind": "step", "milestones": [1], "factor": TINY}),
    (ScheduleConfig, {"kind": "step", "milestones": [1, 2]}),
    (ScheduleConfig, {"kind": "cosine", "floor": 0.0}),
    (ScheduleConfig, {"kind": "cosine", "floor": 1.0}),
    (BestConfig, {"patience": 0}),
    (GuardConfig, {"lr_factor": TINY}),
    (GuardConfig, {"lr_factor": 1.0, "max_rewinds": 0}),
]
NONE = "schedule.milestones: expected epochs for schedule.kind step and none otherwise, got"
REFUSED = [
    *((RunConfig, {name: 0}, f"{name}: expected at least 1, got 0") for name in COUNTS),
    *((RunConfig, {name: -1}, f"{name}: expected 0 or more, got -1") for name in FROM_0),
    *((RunConfig, {name: 0.0}, f"{name}: expected more than 0, got 0.0") for name in MORE_THAN_0),
    *((RunConfig, {name: math.nan}, f"{name}: expected more than 0, got nan") for name in MORE_THAN_0),
    (GanConfig, {"evaluate_every": -1}, "evaluate_every: expected 0 or more, got -1"),
    (RunConfig, {"batch_size": 1}, "batch_size: expected at least 2, got 1"),
    (RunConfig, {"ema_decay": 1.0}, "ema_decay: expected 0 up to, not including, 1, got 1.0"),
    (RunConfig, {"ema_decay": -TINY}, f"ema_decay: expected 0 up to, not including, 1, got {-TINY}"),
    (RunConfig, {"checkpoint_keep": [3, 0]}, "checkpoint_keep: expected epochs from 1 on, got [3, 0]"),
    *((RunConfig, {"name": name}, f"name: expected a plain folder name, got {name!r}") for name in ("", ".x", "a/b")),
    *((RunConfig, {"resume": resume}, "resume: which run? Give its --name") for resume in (True, "auto")),
    (ScheduleConfig, {"kind": "step"}, f"{NONE} [] for step"),
    (ScheduleConfig, {"kind": "cosine", "milestones": [1]},
     f"{NONE} [1] for cosine; a configuration's are cleared by --schedule '{{kind: cosine, milestones: []}}'"),
    *((ScheduleConfig, {"kind": "step", "milestones": epochs},
       f"schedule.milestones: expected rising epochs from 1 on, got {epochs}") for epochs in ([2, 1], [1, 1], [0, 1])),
    (ScheduleConfig, {"factor": 0.0}, "schedule.factor: expected more than 0, got 0.0"),
    (ScheduleConfig, {"floor": -TINY}, f"schedule.floor: expected 0 to 1, got {-TINY}"),
    (ScheduleConfig, {"floor": 1 + 2**-52}, f"schedule.floor: expected 0 to 1, got {1 + 2**-52}"),
    (BestConfig, {"patience": -1}, "best.patience: expected 0 or more, got -1"),
    (GuardConfig, {"lr_factor": 0.0}, "guard.lr_factor: expected more than 0 and at most 1, got 0.0"),
    (GuardConfig, {"lr_factor": 1 + 2**-52}, f"guard.lr_factor: expected more than 0 and at most 1, got {1 + 2**-52}"),
    (GuardConfig, {"max_rewinds": -1}, "guard.max_rewinds: expected 0 or more, got -1"),
]  # fmt: skip


def test_a_range_holds_its_ends():
    for cls, values in TAKEN:
        assert_takes(cls, values)


def test_beyond_them_a_line_names_field_range_and_value():
    for cls, values, line in REFUSED:
        assert_refuses(cls, values, line)
