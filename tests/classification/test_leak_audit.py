import math

import pytest
import torch

from common.classification.leak_audit import (
    Categories,
    Difference,
    Guess,
    audit_inputs,
    counted,
    guess,
    leak_audit,
    paired_difference,
    weighed,
)

CLASSES, CLUSTERS = 8, 4


def labels(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def sure(said: torch.Tensor) -> torch.Tensor:
    """Return logits of a classifier that is sure of what it says."""
    return 9 * torch.nn.functional.one_hot(said, CLASSES).double()


def test_pairs_are_counted():
    given, wanted = torch.tensor([0, 0, 1, 0]), torch.tensor([2, 2, 0, 1])
    assert counted(given, wanted, 3, 4).tolist() == [[0, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_the_best_guess_is_learnt_on_training_images_and_scored_on_others():
    # Training: cluster 0 is mostly class 1, cluster 1 is a tie of 0 and 2, cluster 2 was never seen; overall 1 leads.
    counts = torch.tensor([[1, 5, 0], [2, 0, 2], [0, 0, 0]])
    given = torch.tensor([0, 0, 1, 1, 2])
    found = guess(counts, given, torch.tensor([1, 0, 0, 2, 1]))  # guessed 1, 1, 0, 0, 1
    assert found == Guess(without=2 / 5, given=3 / 5)
    assert found.reduction == pytest.approx((3 / 5 - 2 / 5) / (3 / 5))
    assert (Guess(0.25, 1.0).reduction, Guess(0.5, 0.25).reduction, Guess(1.0, 1.0).reduction) == (1.0, -0.5, 0.0)


def test_weighing_is_bayes_rule():
    """Against p(class | image, cluster) of a joint distribution in which both depend on the class alone."""
    draws = torch.Generator().manual_seed(0)
    prior = torch.tensor([1, 2, 3, 4]) / 10
    image = torch.rand(6, 4, generator=draws, dtype=torch.float64)  # p(image | class)
    counts = torch.tensor([[1, 0, 10, 8], [9, 20, 20, 32]])  # of 100 training images, whose classes have that prior
    cluster = torch.tensor([0, 1, 1, 0, 0, 1])
    unaware = (image * prior).log()
    joint = image * prior * (counts / counts.sum(0))[cluster]
    found = weighed(unaware, cluster, counts).softmax(1)
    torch.testing.assert_close(found, joint / joint.sum(1, keepdim=True))


def test_weighing_by_what_was_never_seen_changes_nothing_or_excludes():
    counts = torch.tensor([[3, 0, 0], [1, 2, 0], [0, 0, 0]])  # cluster 2 and class 2 have no images
    logits = torch.zeros(3, 3, dtype=torch.float64)
    found = weighed(logits, torch.tensor([0, 1, 2]), counts)
    assert found[2].tolist() == [0, 0, 0]
    assert found[:, 2].tolist() == [0, 0, 0]
    assert found[0, 0] == pytest.approx(math.log(1 / (4 / 6)))
    assert found[0, 1] == -math.inf
    assert found[1, 1] == pytest.approx(math.log((2 / 3) / (2 / 6)))


def test_a_paired_difference_is_that_of_mcnemar():
    ours = torch.tensor([True] * 60 + [False] * 40)
    theirs = torch.tensor([True] * 50 + [False] * 10 + [True] * 5 + [False] * 35)
    gained, lost, n = 10, 5, 100  # by one of them alone
    value = (gained - lost) / n
    deviation = math.sqrt((gained + lost - n * value**2) / (n - 1))
    found = paired_difference(ours, theirs)
    assert found.value == pytest.approx(value)
    assert found.half_width == pytest.approx(1.959964 * deviation / math.sqrt(n), rel=1e-6)
    assert paired_difference(ours[:1], theirs[:1]) == Difference(0.0, 0.0)


def test_what_a_classifier_is_given():
    test = torch.tensor([0, 1, 1, 3, 2, 1, 0, 3] * 5)
    ids = audit_inputs(torch.tensor([1, 3, 3, 0, 3]), test, unknown=True)
    assert list(ids) == ["known", "unknown", "shuffled", "constant"]
    assert torch.equal(ids["known"], test)
    assert (ids["unknown"] == -1).all()
    assert torch.equal(ids["shuffled"].bincount(), test.bincount())
    assert not torch.equal(ids["shuffled"], test)
    assert torch.equal(ids["shuffled"], audit_inputs(test, test, unknown=True)["shuffled"])
    assert (ids["constant"] == 3).all()
    assert "unknown" not in audit_inputs(test, test, unknown=False)
    assert {each.shape for each in ids.values()} == {(40,)}
    assert {each.dtype for each in ids.values()} == {torch.int64}


def audited(train: Categories, test: Categories, **more):
    """Audit a classifier that knows the cluster's classes, and nothing of the image: the paper's Table VII in small."""
    counts = counted(train.clusters, train.classes, CLUSTERS, CLASSES)
    ids = audit_inputs(train.clusters, test.clusters, unknown=True)
    logits = {name: sure(counts.argmax(1)[cluster]) for name, cluster in ids.items() if name != "unknown"}
    prior = train.classes.bincount(minlength=CLASSES).double()
    logits["unknown"] = prior.log().expand(len(test.classes), -1)
    return leak_audit(train, test, logits, CLUSTERS, **more)


def test_labels_that_fix_the_clusters_are_flagged():
    """Two classes a cluster: by the cluster alone half of the images are right, else an eighth."""
    train, test = (Categories(y := labels(n, seed), y // 2) for n, seed in ((4000, 0), (4000, 1)))
    found = audited(train, test)
    assert "class of a test image tells its cluster in 100.0 % of cases" in found.reasons[0]
    assert found.clusters.given == 1
    assert found.classes.given == pytest.approx(1 / 2, abs=0.03)
    assert found.classes.without == pytest.approx(1 / 8, abs=0.02)
    assert found.accuracy["known"] == found.classes.given
    assert found.accuracy["shuffled"] == pytest.approx(1 / 8, abs=0.02)
    assert found.accuracy["constant"] == pytest.approx(1 / 8, abs=0.02)
    assert found.accuracy["weighed"] == found.classes.given  # what is lost comes back by arithmetic
    assert found.lost["weighed"].value == 0
    assert found.lost["shuffled"].value == pytest.approx(found.accuracy["known"] - found.accuracy["shuffled"])
    assert found.lost["shuffled"].value > 3 * found.lost["shuffled"].half_width
    assert "LEAK" in "\n".join(found.lines())


def test_clusters_that_fix_the_labels_are_flagged_even_if_finer_than_they_are():
    train, test = (Categories(labels(500, seed) // 4, labels(500, seed) // 2) for seed in (0, 1))
    found = audited(train, test)
    assert found.clusters.reduction < 0.9
    assert found.reasons == ["the cluster of a test image tells its class in 100.0 % of cases"]


def test_clusters_that_labels_do_not_fix_are_not():
    """Random ones, and such as a classifier of pixels would find that is right for nine images in ten."""
    for share in (0.0, 0.9):

        def some(n: int, seed: int, share: float = share) -> Categories:
            y, draws = labels(n, seed), torch.Generator().manual_seed(10 + seed)
            random = torch.randint(0, CLUSTERS, (n,), generator=draws)
            return Categories(y, torch.where(torch.rand(n, generator=draws) < share, y // 2, random))

        found = audited(some(4000, 0), some(4000, 1))
        assert not found.reasons
        assert found.clusters.reduction == pytest.approx(share, abs=0.05)
        assert "LEAK" not in "\n".join(found.lines())
    train, test = (Categories(labels(200, seed), torch.zeros(200, dtype=torch.int64)) for seed in (0, 1))
    found = audited(train, test)  # one cluster for all says nothing
    assert (found.reasons, found.clusters) == ([], Guess(1.0, 1.0))


def test_what_a_setting_says_is_flagged_too():
    train, test = (Categories(labels(400, seed), labels(400, seed + 5) // 2) for seed in (0, 1))
    found = audited(train, test, labelled="clusters.by superclasses")
    assert found.reasons == ["clusters.by superclasses makes test clusters of test labels"]
    assert "LEAK       clusters.by superclasses" in found.lines()[-1]
    assert found.plain()["flagged"] is True


def test_a_baseline_is_compared_image_by_image_or_said_to_be_missing():
    train, test = (Categories(y := labels(600, seed), y // 2) for seed in (0, 1))
    without = audited(train, test)
    assert without.plain()["baseline"] == "no baseline"
    assert any(line.startswith("baseline   no baseline") for line in without.lines())
    said = test.classes.clone()
    said[:150] = (said[:150] + 2) % CLASSES
    found = audited(train, test, baseline=sure(said))
    known = counted(train.clusters, train.classes, CLUSTERS, CLASSES).argmax(1)[test.clusters] == test.classes
    assert found.baseline == 0.75
    assert found.gain == paired_difference(known, said == test.classes)
    assert found.gain is not None
    assert found.gain.value == pytest.approx(found.accuracy["known"] - 0.75)
    assert found.plain()["baseline"] == {"accuracy": 0.75, "gain": found.gain._asdict()}
    text = "\n".join(found.lines())
    assert "baseline   0.750" in text
    assert f"gain       {100 * found.gain.value:.1f} ± {100 * found.gain.half_width:.1f} points" in text


def test_plain_values_hold_all_that_is_printed():
    train, test = (Categories(y := labels(300, seed), y // 2) for seed in (0, 1))
    found = audited(train, test)
    plain, lines = found.plain(), found.lines()
    assert set(plain["accuracy"]) == {"known", "unknown", "shuffled", "constant", "weighed"}
    assert set(plain["lost"]) == set(plain["accuracy"]) - {"known"}
    assert plain["class_given_cluster"] == {
        "without": found.classes.without, "given": found.classes.given, "reduction": found.classes.reduction
    }  # fmt: skip
    assert plain["cluster_given_class"]["reduction"] == 1
    for name, value in plain["accuracy"].items():
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert f"{value:.3f}" in line
        if name != "known":
            lost = found.lost[name]
            way = "less" if lost.value >= 0 else "more"
            assert line.endswith(f", {100 * abs(lost.value):.1f} ± {100 * lost.half_width:.1f} points {way}")
    assert f"chance     {found.classes.given:.3f}" in "\n".join(lines)
