"""Rows of results, claims and the page: planted effects are found, and what cannot be right is refused in one line."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import common.report
from common.reports.claims import findings, read_claims
from common.reports.rows import Row, as_line, merged, read_rows
from common.reports.study import read_study
from common.runtime.errors import UsageError

NOISE = (0.003, -0.002, 0.001, -0.003, 0.001)
"""By seed, in both arms alike; the differences between arms get a smaller one of their own."""
EXPERIMENT = {
    "command": "cbcls.train", "seeds": [0, 1, 2, 3, 4], "arms": {"bn": "", "ucb": "", "in": ""},
    "show": {"metric/accuracy": "accuracy"}, "paper": {"bn": {"metric/accuracy": 0.84}}, "notes": ["Other images."],
}  # fmt: skip
CLAIM = {
    "place": "Table V", "text": "UCB beats BN.", "experiment": "table5", "tag": "metric/accuracy", "treated": "ucb",
    "control": "bn", "better": "higher", "scale": 100, "unit": "points", "effect": 2,
}  # fmt: skip


def row(arm: str, seed: int, accuracy: float | None, experiment: str = "table5", **more) -> Row:
    plain = Row(
        experiment=experiment, arm=arm, seed=seed, settings={"norm.kind": arm}, last={"metric/accuracy": accuracy},
        chosen={}, series={}, health={"norm3/effective": 2.5}, protocol={"content_test": "t" * 64},
        images={"test": {"count": 100, "content_hash": "t" * 64}}, epochs=20, collapsed=None, commit="c" * 40,
        versions={"torch": "2.14.1"}, hardware={"cpu": "x86", "cores": 2, "gpu": None}, device="cpu", threads=1,
        seconds={"training": 60.0}, peak_memory_mib=900.0,
    )  # fmt: skip
    return replace(plain, **more)


def rows(gains: dict[str, float], experiment: str = "table5") -> list[Row]:
    """Five seeds of BN at 80 % and of other arms above it by their gain."""
    return [
        row(arm, seed, 0.8 + noise + gain + (-1) ** seed * 0.001 * (arm != "bn"), experiment)
        for arm, gain in {"bn": 0.0, **gains}.items()
        for seed, noise in enumerate(NOISE)
    ]


@pytest.fixture
def study(tmp_path):
    """Write a study with its results and claims; returns the study's file."""

    def write(results: list[Row], claims: dict, **experiments) -> Path:
        (tmp_path / "results.jsonl").write_text("".join(f"{as_line(each)}\n" for each in results))
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump(claims, sort_keys=False))
        places = {"runs": tmp_path / "runs", "results": tmp_path / "results.jsonl", "claims": tmp_path / "claims.yaml"}
        named = {name: str(path) for name, path in places.items()}
        content = {**named, "experiments": experiments or {"table5": EXPERIMENT}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "study.yaml"

    return write


def verdicts(study_file: Path) -> dict[str, str]:
    found = read_study(study_file)
    assert found.claims is not None
    made = findings(read_claims(found.claims), read_rows(found.results), found.experiments)
    return {finding.claim.id: finding.verdict for finding in made}


def test_each_verdict_is_given_to_rows_that_deserve_it(study):
    gains = {"whole": 0.02, "small": 0.005, "none": 0.0, "wide": 0.008, "few": 0.02, "too": 0.019}
    results = [each for each in rows(gains) if each.arm != "few" or each.seed < 4]
    results = [replace(each, last={"metric/accuracy": each.last["metric/accuracy"] + 0.03 * (-1) ** each.seed})
               if each.arm == "wide" else each for each in results]  # fmt: skip
    claims = {arm: CLAIM | {"treated": arm} for arm in gains} | {
        "whole": CLAIM | {"treated": "whole", "controls": ["too"]}
    }
    assert verdicts(study(results, claims)) == {
        "whole": "holds, but so does too", "small": "holds, smaller than claimed", "none": "fails", "wide": "undecided",
        "few": "not tested", "too": "holds",
    }  # fmt: skip


def test_a_difference_of_differences_a_quarter_of_the_epochs_and_a_curve(study):
    accuracies = {"bn": (0.80, 0.01), "ucb": (0.82, 0.01), "bn-fast": (0.70, 0.0), "ucb-fast": (0.75, 0.0)}
    results = [row(arm, seed, a + seed * b) for seed in range(5) for arm, (a, b) in accuracies.items()]
    curves = {"bn": [1.0, 2.0, 3.0, 4.0], "ucb": [1.5, 2.5, 3.0, 4.0]}
    results = [replace(each, epochs=4, series={"loss": list(enumerate(curves[each.arm.partition("-")[0]], 1))})
               for each in results]  # fmt: skip
    claims = {
        "rate": CLAIM | {"treated": ["ucb-fast", "bn-fast"], "control": ["ucb", "bn"]},
        "quarter": CLAIM | {"tag": "loss", "take": "quarter", "scale": 1},
        "mean": CLAIM | {"tag": "loss", "take": "mean", "scale": 1},
    }
    file = study(results, claims)
    made = findings(read_claims(file.parent / "claims.yaml"), read_rows(file.parent / "results.jsonl"))
    assert [finding.judged.difference.mean for finding in made] == pytest.approx([3.0, 0.5, 0.25])


def test_what_is_missing_or_not_finite_is_said(study, tmp_path, capsys):
    results = [*rows({"ucb": 0.02}), row("in", 0, None)]
    results[5] = replace(results[5], collapsed={"step": 7, "cause": "dead"})
    claims = {
        "V": CLAIM | {"controls": ["in"]},
        "VI": CLAIM | {"treated": "lost"},
        "VII": CLAIM | {"experiment": "vit"},
    }
    file = study(results, claims)
    file.write_text(f"{file.read_text()}untested: {{vit: needs a GPU}}\n")
    common.report.main(["page", "--study", str(file), "--out", str(tmp_path / "page")])
    printed = capsys.readouterr().out.splitlines()[:3]
    assert printed == ["V            holds", "VI           not tested", "VII          not tested"]
    text = (tmp_path / "page" / "page.md").read_text()
    assert "lost has no runs" in text
    assert "- vit: needs a GPU" in text
    assert "Missing runs: in-seed1, in-seed2, in-seed3, in-seed4." in text
    assert "Found collapsed: ucb-seed0 in step 7." in text
    assert "| in | 1 of 5 | -, 1 not finite | - |" in text
    assert "| bn | 5 of 5 | 0.8 ± 0.003 | 0.84 | 1.0 | 900 | 2.5 |" in text


class Links(HTMLParser):
    """Collects what a page would load, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")]
        if tag not in ("meta", "line", "path", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_opens_offline_and_escapes_what_it_quotes(study, tmp_path):
    file = study(rows({"ucb": 0.02}), {"V<": CLAIM | {"text": "a < b & c"}})
    common.report.main(["page", "--study", str(file), "--out", str(tmp_path / "page"), "--title", "<script>"])
    html = (tmp_path / "page" / "index.html").read_text()
    parser = Links()
    parser.feed(html)
    assert (parser.loaded, parser.open) == ([], [])
    assert "<script>" not in html
    assert "a &lt; b &amp; c" in html
    assert "<svg" in html
    with pytest.raises(UsageError, match=r"^out: .* exists; add --force"):
        common.report.main(["page", "--study", str(file), "--out", str(tmp_path / "page")])


def refused(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        common.report.main(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_right_is_one_line_and_writes_nothing(study, tmp_path):
    page = ("page", "--out", str(tmp_path / "page"), "--study")
    file = str(study(rows({"ucb": 0.02}), {"V": CLAIM | {"experiment": "tabel5"}}))
    assert "V names experiment tabel5; there are table5" in refused(*page, file)
    claims = {
        "treatd": CLAIM | {"treatd": "x"},
        "better": CLAIM | {"better": "more"},
        "effect": CLAIM | {"effect": "2"},
    }
    for entry, claim in claims.items():
        assert f"V.{entry}" in refused(*page, str(study(rows({"ucb": 0.0}), {"V": claim})))
    other = [
        replace(each, protocol={"content_test": "u" * 64}) if each.seed == 3 else each for each in rows({"ucb": 0.0})
    ]
    line = refused(*page, str(study(other, {"V": CLAIM})))
    assert "table5/ucb-seed0 and table5/ucb-seed3 were measured otherwise (content_test differ)" in line
    twice = [*rows({"ucb": 0.0}), row("bn", 2, 0.5, commit="d" * 40)]
    line = refused(*page, str(study(twice, {"V": CLAIM})))
    assert "table5/bn-seed2 is there twice, of commit cccccccccccc and of commit dddddddddddd" in line
    assert "holds no rows" in refused(*page, str(study([], {"V": CLAIM})))
    assert "holds extra/bn-seed0, which" in refused(*page, str(study(rows({}, "extra"), {})))
    for entry, value in {"seeds": [], "minutes": 0, "arms": "bn", "colour": 1}.items():
        bad = {"table5": EXPERIMENT | {entry: value}}
        assert f"experiments.table5.{entry}" in refused(*page, str(study(rows({}), {}, **bad)))
    (tmp_path / "results.jsonl").write_text("{}\n")
    study_file = tmp_path / "study.yaml"
    study_file.write_text(study_file.read_text().replace("colour: 1", "title: x"))
    assert "results.jsonl line 1: expected a row with experiment, arm" in refused(*page, str(study_file))
    assert "study: cannot read" in refused(*page, str(tmp_path / "none.yaml"))
    assert "expected collect or page, got pages" in refused("pages")
    assert not (tmp_path / "page").exists()


def test_rows_are_collected_from_finished_runs_and_kept(study, tmp_path, capsys):
    file = study([row("in", 4, 0.7)], {"V": CLAIM | {"take": "mean"}})
    for seed, state in ((0, "finished"), (1, "running")):
        folder = tmp_path / "runs" / "table5" / "cbcls" / f"bn-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"seed: {seed}\nnorm: {{kind: bn}}\n")
        lines = [
            {"step": 5 * e, "epoch": e, "metric/accuracy": a, "health/norm3/effective": 2.0}
            for e, a in ((1, 0.5), (2, 0.6))
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        session = {"commit": "e" * 40, "versions": {}, "hardware": {"cpu": "x86"}, "device": "cpu", "threads": 1}
        (folder / "environment.json").write_text(json.dumps({"sessions": [session]}))
        summary = {
            "state": state, "last": {"metric/accuracy": {"value": 0.6, "epoch": 2}}, "images": {}, "collapsed": None,
            "protocol": {"content_test": "t" * 64}, "best": {"with": {"metric/accuracy": 0.5}},
            "epochs": {"done": 2, "wanted": 2}, "seconds": {"training": 3.0}, "peak_memory_mib": 10.0,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    for _ in range(2):  # the second time nothing is new
        common.report.main(["collect", "--study", str(file)])
    assert "2 rows, 0 of them new; 14 planned runs are not finished" in capsys.readouterr().out
    kept, new = sorted(read_rows(tmp_path / "results.jsonl"), key=lambda each: each.arm != "in")
    assert (kept.arm, new.arm, new.seed, new.commit) == ("in", "bn", 0, "e" * 40)
    assert (new.last["metric/accuracy"], new.chosen["metric/accuracy"]) == (0.6, 0.5)
    assert new.series == {"metric/accuracy": [[1, 0.5], [2, 0.6]]}
    assert new.health == {"norm3/effective": 2.0}
    (tmp_path / "runs/table5/cbcls/bn-seed0/metrics.jsonl").write_text(
        '{"step": 5, "epoch": 1, "metric/accuracy": 0.1}\n'
    )
    assert "table5/bn-seed0 is there already with other values" in refused("collect", "--study", str(file))
    common.report.main(["collect", "--study", str(file), "--force"])
    with pytest.raises(UsageError, match="other values"):
        merged([row("bn", 0, 0.1)], [row("bn", 0, 0.2)], replace=False)
