"""Adapting a model to a new study: what it learns, what it keeps, when it stops, and which scans it asks for."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_study import scan, write_card

from lvseg import adapt, finetune, metrics, records, replay
from lvseg.adapt import Plan
from lvseg.cards import find_scans, load_card, read_image, read_labels
from lvseg.errors import InputError
from lvseg.evaluate import evaluate_run
from lvseg.export import publish, weights, weights_sha256
from lvseg.finetune import MOST_FORGOTTEN
from lvseg.formats import read_volume, write_volume
from lvseg.pipeline import volume_samples
from lvseg.predict import Segmenter
from lvseg.prepare import prepare
from lvseg.replay import LEAST_TO_LEAVE_OUT, Shard, Volumes, known, left_out
from lvseg.split import SCAN_DIGITS, scans_seen_by
from lvseg.study import open_model
from lvseg.suggest import Look, look, suggest, write_own_masks
from lvseg.volume import Volume

QUICK = Plan(steps=150, learning_rate=2e-3, minutes=20)


def dimmed(number: int) -> tuple:
    """A patient of scanner a as the new study's scanner shows them: the organ darker than others' bodies."""
    image, mask = scan("a", number)
    return image.with_voxels((0.42 * image.voxels).astype(np.int16)), mask


def write_dimmed(folder: Path, numbers: range) -> None:
    for number in numbers:
        image, mask = dimmed(number)
        patient = folder / f"c-{number:03d}"
        patient.mkdir(parents=True)
        write_volume(image, patient / "image.nii.gz")
        write_volume(mask.with_voxels(mask.voxels * 7), patient / "organs.nii.gz")


@pytest.fixture(scope="module")
def new_study(study: Path) -> Path:
    """The study with a third card, c, of six patients at another contrast."""
    write_dimmed(study / "raw/c", range(20, 26))
    write_card(study, "c")
    return study


@pytest.fixture(scope="module")
def adapted(trained: Path, new_study: Path, request: pytest.FixtureRequest) -> tuple[dict, Path]:
    """What adapting to all six patients measured, and the folder of versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(new_study)
        measured = adapt.adapt(trained / "model", [Path("cards/c.yaml")], new_study / "versions", plan=QUICK)
    return measured, new_study / "versions"


def mean_dice(model: Path, numbers: range, make) -> float:
    """On the scans' own grids, by the exported model."""
    segmenter = Segmenter(model)
    found = []
    for number in numbers:
        image, mask = make(number)
        found.append(metrics.dice(segmenter.segment(image).mask.voxels > 0, mask.voxels > 0))
    return float(np.mean(found))


def of_model(info: dict, cards: list[Path] | None = None, new: tuple[str, ...] = ()) -> tuple[Volumes, Volumes]:
    """Who is replayed and who tells what is forgotten when a model of this card is adapted."""
    own = adapt._experiment(info, info["experiment"]["data"]["datasets"], QUICK).data
    return known(info["provenance"], own, own, cards, set(new))[:2]


def test_it_learns_the_new_study_and_keeps_what_it_knew(trained, adapted):
    measured, versions = adapted
    fresh, known = range(60, 66), range(40, 46)  # patients that neither training saw
    before = mean_dice(trained / "model", fresh, dimmed)
    after = mean_dice(versions / "1", fresh, dimmed)
    assert after > before + 0.05 and after > 0.9
    assert mean_dice(versions / "1", known, lambda n: scan("a", n)) > (
        mean_dice(trained / "model", known, lambda n: scan("a", n)) - 0.05
    )
    assert measured["left_out"]["patients"] == 1 and measured["adapted_on"]["patients"] == 5
    assert measured["left_out"]["after"] > measured["left_out"]["before"]
    assert measured["known"]["after"] >= measured["known"]["before"] - MOST_FORGOTTEN


def test_the_new_version_says_where_it_comes_from_and_whom_it_has_seen(trained, adapted, new_study, monkeypatch):
    monkeypatch.chdir(new_study)
    measured, versions = adapted
    assert measured["version"] == str(versions / "1")
    card = json.loads((versions / "1/model.json").read_text())
    parent = json.loads((trained / "model/model.json").read_text())
    (how,) = card["provenance"]["adapted"]
    assert how["from"]["weights_sha256"] == parent["weights_sha256"] != card["weights_sha256"]
    assert len(how["patients"]) == 5 and len(how["left_out"]) == 1
    assert set(how["patients"]) <= set(card["provenance"]["split"]["train"])
    assert card["measured"]["left_out"] == measured["left_out"]
    assert {key: card[key] for key in ("size", "spacing_mm", "labels")} == {
        key: parent[key] for key in ("size", "spacing_mm", "labels")
    }
    with pytest.raises(InputError, match="c-0"):  # not on patients that decided about it
        evaluate_run(trained, "test", model=versions / "1", out=new_study / "other", cards=[Path("cards/c.yaml")])


def test_the_weights_come_back_from_a_saved_model_if_they_are_its_own(trained, tmp_path):
    with np.load(next((trained / "checkpoints").glob("best-*.npz"))) as best:
        kept = [best[name] for name in sorted(best.files)]
    for one, other in zip(weights(trained / "model"), kept, strict=True):
        np.testing.assert_array_equal(one, other)
    mixed = Path(shutil.copytree(trained / "model", tmp_path / "mixed"))  # as an interrupted copy of two versions
    card = json.loads((mixed / "model.json").read_text())
    (mixed / "model.json").write_text(json.dumps({**card, "weights_sha256": "ab" * 32}))
    with pytest.raises(InputError, match="weights that model"):
        weights(mixed)


def test_the_same_seed_adapts_alike(trained, new_study, monkeypatch, tmp_path):
    monkeypatch.chdir(new_study)
    for name, value in {"CHECK_EVERY": 10, "ENOUGH": -1.0, "MOST_FORGOTTEN": 1.0}.items():
        monkeypatch.setattr(finetune, name, value)  # ten steps are taken, whatever they are worth
    plan = Plan(steps=10, learning_rate=2e-3, minutes=20)
    written = []
    for place in ("one", "two"):
        adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / place, ["c-020", "c-021"], plan)
        written.append(json.loads((tmp_path / place / "1/model.json").read_text()))
    one, two = (weights(tmp_path / place / "1") for place in ("one", "two"))
    assert all(np.array_equal(first, second) for first, second in zip(one, two, strict=True))
    assert written[0]["provenance"]["adapted"][0]["left_out"] == []  # two are too few to spare one


def test_what_does_not_help_is_not_written(trained, new_study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(new_study)
    plan = Plan(steps=25, learning_rate=1e-9, minutes=20)
    measured = adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / "out", plan=plan)
    assert measured["version"] is None and not (tmp_path / "out").exists()
    assert measured["known"]["after"] == measured["known"]["before"]
    adapt.print_measured(measured, own_masks=False)
    printed = capsys.readouterr().out
    assert "nothing is written" in printed and "known before" in printed and "not measured" not in printed


def test_that_nothing_tells_what_is_forgotten_is_said(trained, new_study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(new_study)
    plan = Plan(steps=1, learning_rate=1e-9, minutes=20, replay=())
    measured = adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / "out", ["c-020"], plan)
    adapt.print_measured(measured, own_masks=False)
    assert "known" not in measured and "what it forgets was not measured" in capsys.readouterr().out


def test_it_goes_by_the_known_patients_too(trained, new_study, monkeypatch, tmp_path):
    """A model that forgets is not taken, however well it does on the new study."""
    monkeypatch.chdir(new_study)
    monkeypatch.setattr(finetune, "MOST_FORGOTTEN", -1.0)  # any result counts as forgetting
    plan = Plan(steps=25, learning_rate=2e-3, minutes=20)
    measured = adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / "out", plan=plan)
    assert measured["version"] is None


def scripted(monkeypatch, values: list[float]) -> None:
    """Checks that answer one value after another, for the new study and for known patients alike."""
    answers = iter({"adapted_on": value, "known": 0.9} for value in values)
    monkeypatch.setattr(finetune, "check", lambda *_: next(answers))


@pytest.mark.parametrize(
    ("values", "done", "taken"),
    [([0.5] * 3, 10, 0), ([0.5, 0.6, 0.6, 0.6], 15, 5), ([0.5, 0.6, 0.6, 0.7, 0.7], 20, 15)],
)
def test_it_ends_when_two_checks_bring_nothing_and_takes_the_best(
    trained, new_study, monkeypatch, tmp_path, values, done, taken
):
    monkeypatch.chdir(new_study)
    for name, value in {"CHECK_EVERY": 5, "LEAST_STEPS": 5}.items():
        monkeypatch.setattr(finetune, name, value)
    scripted(monkeypatch, values)
    plan = Plan(steps=20, learning_rate=1e-4, minutes=20)
    measured = adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / "out", ["c-020"], plan)
    assert (measured["steps_done"], measured["steps"]) == (done, taken)
    assert measured["ended_by"] == ("steps" if done == plan.steps else "no gain")
    assert measured["adapted_on"]["after"] == max(values) and bool(measured["version"]) == bool(taken)


@pytest.mark.parametrize("least", [10, 25])
def test_it_ends_in_time_and_writes_nothing_after_a_few_steps(trained, new_study, monkeypatch, tmp_path, capsys, least):
    """A clock that goes on by 3 s whenever it is looked at: after the first check and before each step."""
    monkeypatch.chdir(new_study)
    monkeypatch.setattr(finetune, "LEAST_STEPS", least)
    ticks = iter(range(0, 10_000, 3))
    monkeypatch.setattr(finetune, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    scripted(monkeypatch, [0.5, 0.9])
    plan = Plan(steps=40, learning_rate=1e-4, minutes=1)
    measured = adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / "out", ["c-020"], plan)
    done = 18  # 3 s for the check and for each step, and 6 s kept for a last check and a second one: 63 s
    assert (measured["steps_done"], measured["ended_by"]) == (done, "minutes")
    assert bool(measured["version"]) == (done >= least)
    adapt.print_measured(measured, own_masks=False)
    printed = capsys.readouterr().out
    assert f"the time was up after {done} steps; --minutes gives more" in printed
    assert ("nothing is written after fewer than 25 steps" in printed) == (done < least)


def test_every_earlier_study_is_replayed_and_looked_at(trained, in_study, monkeypatch):
    info = json.loads((trained / "model/model.json").read_text())
    split, studies = info["provenance"]["split"], info["provenance"].setdefault("adapted", [])
    ids = {part: sorted(split[part]) for part in ("train", "validation")}
    assert min(map(len, ids.values())) >= 4
    one, two = ids["train"][1:3], ids["train"][3:4]
    studies.append({"patients": one, "left_out": []})
    studies.append({"patients": two, "left_out": ids["validation"][:1]})
    for most in (4, 6):
        monkeypatch.setattr(replay, "REPLAYED", most)
        monkeypatch.setattr(replay, "CHECKED", most)
        replayed, judging = of_model(info)
        assert set(replayed.patients) & set(one) and set(two) <= set(replayed.patients)
        assert set(judging.patients) & set(one) and ids["validation"][0] in judging.patients
        assert len(replayed.patients) <= most and len(judging.patients) <= most
        assert set(replayed.patients) - {*one, *two} and set(judging.patients) - {*one, ids["validation"][0]}


def test_other_cards_than_the_models_can_be_replayed(trained, new_study, monkeypatch):
    monkeypatch.chdir(new_study)
    info = json.loads((trained / "model/model.json").read_text())
    ids = {f"c-{number:03d}" for number in range(20, 26)}
    replayed, judging = of_model(info, [Path("cards/c.yaml")])
    assert set(replayed.patients) | set(judging.patients) == ids and len(judging.patients) == 1
    replayed, judging = of_model(info, [Path("cards/c.yaml")], new=("c-020", "c-021", "c-022"))
    assert set(replayed.patients) | set(judging.patients) == {"c-023", "c-024", "c-025"}
    replayed, judging = of_model(info, [Path("cards/a.yaml")])
    assert not set(info["provenance"]["split"]["test"]) & {*replayed.patients, *judging.patients}
    assert all(name.startswith("a-") for name in replayed.patients)


def test_whom_other_cards_replay_is_remembered(trained, new_study, monkeypatch, tmp_path):
    """They trained the new version, or told what it forgot, so it is neither measured on them nor adapted to them."""
    monkeypatch.chdir(new_study)
    for name, value in {"CHECK_EVERY": 5, "LEAST_STEPS": 5, "ENOUGH": -1.0, "MOST_FORGOTTEN": 1.0}.items():
        monkeypatch.setattr(finetune, name, value)
    text, ids = (new_study / "cards/c.yaml").read_text(), [f"c-{number:03d}" for number in range(20, 26)]
    cards = {"mine": ids[:2], "others": ids[2:]}
    for name, patients in cards.items():
        own = text.replace("set_c", name) + f"patients: [{', '.join(patients)}]\n"
        (new_study / f"cards/{name}.yaml").write_text(own)
    plan = Plan(steps=5, learning_rate=1e-4, minutes=20, replay=(Path("cards/others.yaml"),))
    adapt.adapt(trained / "model", [Path("cards/mine.yaml")], tmp_path / "out", plan=plan)
    provenance = json.loads((tmp_path / "out/1/model.json").read_text())["provenance"]
    split, before = provenance["split"], json.loads((trained / "model/model.json").read_text())["provenance"]["split"]
    told = set(split["validation"]) - set(before["validation"])
    assert set(split["train"]) - set(before["train"]) == set(ids) - told
    assert len(told) == 1 and told <= set(cards["others"])
    assert {"mine", "others", "set_a", "set_b"} == {source["name"] for source in provenance["datasets"]}
    with pytest.raises(InputError, match="has not seen, received c-022"):
        open_model(tmp_path / "out/1", [Path("cards/others.yaml")])
    with pytest.raises(InputError, match="does not know, received c-022"):
        adapt.adapt(tmp_path / "out/1", [Path("cards/c.yaml")], tmp_path / "next", plan=QUICK)


def test_a_scan_of_the_models_datasets_is_refused_under_another_name(trained, new_study, monkeypatch, tmp_path):
    monkeypatch.chdir(new_study)
    known_as = new_study / "raw/c/c-099"
    shutil.copytree(new_study / "raw/a/a-001", known_as)  # who tests the model
    try:
        with pytest.raises(InputError, match="those of their patient a-001 for c-099"):
            adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / "out", ["c-099", "c-020"], QUICK)
    finally:
        shutil.rmtree(known_as)


def test_a_scan_that_the_model_would_see_as_nothing_is_refused(trained, in_study, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    card = json.loads((model / "model.json").read_text())
    card["experiment"]["data"] |= {"normalise": "patient", "clip_percentiles": [0.5, 99.5]}
    (model / "model.json").write_text(json.dumps(card))
    write_dimmed(in_study / "raw/d", range(30, 31))
    image, mask = dimmed(31)
    voxels = np.zeros_like(image.voxels)
    voxels[4, 20, 20:26] = 200  # of 15,840 voxels
    (in_study / "raw/d/c-031").mkdir()
    write_volume(image.with_voxels(voxels), in_study / "raw/d/c-031/image.nii.gz")
    write_volume(mask.with_voxels(mask.voxels * 7), in_study / "raw/d/c-031/organs.nii.gz")
    study = write_card(in_study, "d")
    with pytest.raises(InputError, match=r"patient c-031 .*c-031\+1\.tfrecord") as error:
        adapt.adapt(model, [study], tmp_path / "versions", plan=Plan(steps=1, replay=()))
    assert error.value.code == "BAD_SCANS" and not (tmp_path / "versions").exists()


def test_those_who_decided_do_not_train_alone(adapted, new_study, monkeypatch, tmp_path):
    monkeypatch.chdir(new_study)
    (study,) = json.loads((adapted[1] / "1/model.json").read_text())["provenance"]["adapted"]
    assert study["from"]["version"] is None  # a run's model has none
    with pytest.raises(InputError, match=r"Expected patients to learn from, received c-0\d\d alone"):
        adapt.adapt(adapted[1] / "1", [Path("cards/c.yaml")], tmp_path / "out", study["left_out"], QUICK)


def test_a_check_reads_a_few_evenly_spread_slices_of_each_scan(trained, new_study, monkeypatch):
    monkeypatch.chdir(new_study)
    info = adapt._info(trained / "model")
    experiment = adapt._experiment(info, [Path("cards/c.yaml")], QUICK)
    every = Volumes.of_sets(prepare(experiment.data))
    reading = finetune.reading_of(experiment, info, every.patients)
    whole = next(iter(volume_samples([every.files[0]], reading)))
    read, count = [], every.rows[0][2]

    class OnlyTheFirstHalfRight:
        class model:
            output_shape = (None, None, None, 2)

        def labels(self, volume):
            read.append(volume.source[:, 1].numpy().tolist())
            mask = volume.mask.numpy()[..., 0]
            return np.where((volume.source[:, 1].numpy() < count / 2)[:, None, None], mask, 0)

    def of_halves(slices):
        """Half of the masks is found: 2 |first half| / (|first half| + |all|), by hand."""
        sizes = whole.mask.numpy()[..., 0].sum(axis=(1, 2))[slices].astype(float)
        first = sizes[np.asarray(slices) < count / 2].sum()
        return 2 * first / (first + sizes.sum())

    one = Volumes(every.rows[:1])
    groups = {"adapted_on": one, "known": one}
    checked = finetune.check(OnlyTheFirstHalfRight(), groups, reading)
    assert count <= finetune.CHECKED_SLICES["known"] and read == [list(range(count))] * 2  # no more than it may read
    assert checked["known"] == checked["adapted_on"] == pytest.approx(of_halves(list(range(count))))
    monkeypatch.setitem(finetune.CHECKED_SLICES, "known", 3)
    spread = [0, round((count - 1) / 2), count - 1]
    middle = finetune.check(OnlyTheFirstHalfRight(), groups, reading)
    assert read[2:] == [list(range(count)), spread]
    assert middle["adapted_on"] == checked["adapted_on"] and middle["known"] == pytest.approx(of_halves(spread))
    two = Volumes(every.rows[:2])
    finetune.check(OnlyTheFirstHalfRight(), {"known": two}, reading)
    assert [len(slices) for slices in read[4:]] == [1, 1]  # of a group, however many scans it has


def test_a_patient_of_many_visits_takes_no_other_ones_place():
    visits = {f"p{number:02d}": 100 if number == 5 else 1 + number % 3 for number in range(12)}
    rows = [Shard(name, Path(f"{name}-{visit}"), 55, "") for name, count in visits.items() for visit in range(count)]
    assert [row.patient for row in Volumes(tuple(rows)).spread(12).rows] == sorted(visits)
    assert len(Volumes(tuple(rows)).spread(15).rows) == 15


def test_a_model_trained_by_steps_of_its_rate_can_be_adapted(trained, in_study):
    info = json.loads((trained / "model/model.json").read_text())
    info["experiment"]["train"] |= {"schedule": "step", "decay_steps": [5], "decay_factor": 0.5}
    assert adapt._experiment(info, [Path("cards/a.yaml")], QUICK).train.schedule == "cosine"


def test_one_of_two_cards_of_an_earlier_study_is_refused(adapted, new_study, monkeypatch, tmp_path):
    """Or the patients of the other one, or those of its namesake, would no longer be replayed, without a word."""
    monkeypatch.chdir(new_study)
    shutil.copytree(adapted[1] / "1", tmp_path / "1")
    card = json.loads((tmp_path / "1/model.json").read_text())
    card["provenance"]["adapted"][0] |= {"cards": ["set_c", "set_d"], "paths": ["cards/c.yaml", "cards/d.yaml"]}
    (tmp_path / "1/model.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="set_c and set_d, received set_c without set_d"):
        adapt.adapt(tmp_path / "1", [Path("cards/c.yaml")], tmp_path / "out", plan=QUICK)


@pytest.mark.parametrize(("patients", "visits"), [(48, 4), (3, 6), (12, 1), (5, 2)])
def test_a_check_reads_a_dozen_scans_of_as_many_patients(patients, visits):
    """So that with many visits some slices of each are read, and not its ends alone, where no organ is."""
    rows = [Shard(f"p{number:02d}", Path(f"{number}-{visit}"), 55, "") for visit in range(visits)
            for number in range(patients)]  # fmt: skip
    read = Volumes(tuple(rows)).spread(12)
    assert len(read.rows) == len(set(read.rows)) == min(12, patients * visits)
    assert len(read.patients) == min(12, patients)
    assert min(finetune.slices_a_scan(name, read, own_masks=False) for name in ("left_out", "known")) >= 10


def test_of_a_network_that_forgets_too_much_half_the_way_is_taken(trained, new_study, monkeypatch, tmp_path):
    monkeypatch.chdir(new_study)
    monkeypatch.setattr(finetune, "CHECK_EVERY", 10)
    monkeypatch.setattr(finetune, "LEAST_STEPS", 10)
    before, far, halfway = (
        {"known": known, "adapted_on": new} for known, new in ((0.9, 0.5), (0.8, 0.9), (0.895, 0.8))
    )
    plan = Plan(steps=10, learning_rate=2e-3, minutes=20)
    written = []
    for place, answers in (("all", [before, {**far, "known": 0.9}]), ("half", [before, far, halfway])):
        checks = iter(answers)
        monkeypatch.setattr(finetune, "check", lambda *_, checks=checks, **__: next(checks))
        written.append(
            adapt.adapt(trained / "model", [Path("cards/c.yaml")], tmp_path / place, ["c-020", "c-021"], plan)
        )
    start, end, half = (weights(folder) for folder in (trained / "model", tmp_path / "all/1", tmp_path / "half/1"))
    assert not np.array_equal(start[0], end[0])
    for old, new, mean in zip(start, end, half, strict=True):
        np.testing.assert_allclose(mean, (old + new) / 2, rtol=1e-5, atol=1e-7)
    assert written[1]["adapted_on"]["after"] == 0.8 and written[1]["known"]["after"] == 0.895
    for place, share in (("all", 1.0), ("half", 0.5)):
        info = json.loads((tmp_path / place / "1/model.json").read_text())
        assert info["provenance"]["adapted"][0]["interpolation"] == share


def test_a_later_adaptation_takes_the_same_card_with_more_patients(adapted, new_study, monkeypatch, tmp_path):
    """Who was adapted to is adapted to again, who decided decides again, and the earlier study is replayed."""
    monkeypatch.chdir(new_study)
    for name, value in {"CHECK_EVERY": 5, "ENOUGH": -1.0, "MOST_FORGOTTEN": 1.0}.items():
        monkeypatch.setattr(finetune, name, value)
    first = json.loads((adapted[1] / "1/model.json").read_text())
    write_dimmed(new_study / "raw/more", range(26, 32))
    for patient in (new_study / "raw/c").iterdir():
        (new_study / "raw/more" / patient.name).symlink_to(patient)
    card = new_study / "cards/c.yaml"
    before = card.read_text()
    card.write_text(before.replace("raw/c", "raw/more"))
    plan = Plan(steps=5, learning_rate=1e-4, minutes=20)
    try:
        card.write_text(
            before.replace("raw/c", "raw/more") + f"patients: [{', '.join(f'c-{n:03d}' for n in range(26, 32))}]"
        )
        with pytest.raises(
            InputError, match=r"earlier adaptation to set_c in its card, too, received one without c-020"
        ):
            adapt.adapt(adapted[1] / "1", [card], tmp_path / "none", plan=plan)
        card.write_text(before.replace("raw/c", "raw/more"))
        adapt.adapt(adapted[1] / "1", [card], tmp_path / "next", plan=plan)  # named otherwise than the first time
    finally:
        card.write_text(before)
    second = json.loads((tmp_path / "next/1/model.json").read_text())
    one, two = second["provenance"]["adapted"]
    assert two["from"]["version"] == 1
    assert one == first["provenance"]["adapted"][0] and set(two["left_out"]) > set(one["left_out"])
    assert len(two["left_out"]) == 3 and not set(two["left_out"]) & set(one["patients"])
    assert set(two["patients"]) == {f"c-{number:03d}" for number in range(20, 32)} - set(two["left_out"])
    assert second["experiment"]["data"]["datasets"] == ["cards/a.yaml", "cards/b.yaml", str(card)]
    sources = [(each["name"], each["licence"]) for each in second["provenance"]["datasets"]]
    assert sources == [(f"set_{name}", load_card(Path(f"cards/{name}.yaml"))[0].licence) for name in "abc"]
    replayed, judging = of_model(second)
    assert set(replayed.patients) & set(one["patients"]) and set(one["left_out"]) <= set(judging.patients)
    ours = {*one["patients"], *two["left_out"], *two["patients"]}
    apart = of_model(second, new=tuple(ours))  # once the study goes on, its own patients are not what was known
    assert all(part.patients and not set(part.patients) & ours for part in apart)


def test_a_model_whose_odds_were_corrected_is_adapted_and_says_so(trained, new_study, monkeypatch, tmp_path):
    monkeypatch.chdir(new_study)
    for name, value in {"CHECK_EVERY": 10, "ENOUGH": -1.0, "MOST_FORGOTTEN": 1.0}.items():
        monkeypatch.setattr(finetune, name, value)  # ten steps are taken, whatever they are worth
    corrected = publish([trained / "model"], tmp_path / "corrected", foreground_odds=2.0)
    done = adapt.adapt(corrected, [Path("cards/c.yaml")], tmp_path / "models", None, Plan(steps=10, minutes=20))
    info = json.loads((Path(done["version"]) / "model.json").read_text())["provenance"]
    assert [step["foreground_odds"] for step in info["corrected"]] == [2.0]
    assert info["adapted"][0]["from"]["weights_sha256"] == weights_sha256(corrected)


def test_half_of_every_batch_is_replayed(trained, new_study, monkeypatch):
    monkeypatch.chdir(new_study)
    info = adapt._info(trained / "model")
    experiment = adapt._experiment(info, [Path("cards/c.yaml")], QUICK)
    new = Volumes.of_sets(prepare(experiment.data))
    replayed, judging = of_model(info)
    split = info["provenance"]["split"]
    assert set(replayed.patients) <= set(split["train"]) and set(judging.patients) <= set(split["validation"])
    reading = finetune.reading_of(experiment, info, (*new.patients, *replayed.patients))
    for samples in finetune.batches_of(experiment, new, replayed, reading).take(5):
        brightest = samples.stack.numpy().max(axis=(1, 2, 3)) * samples.scale[:, 1, 0].numpy()
        brightest += samples.scale[:, 1, 1].numpy()
        assert (brightest < 115).tolist() == [True, True, False, False]  # bodies of others are at 120


def test_own_masks_replace_segmented_patients(trained, study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    scans = []
    for number in range(30, 34):
        image, _ = scan("b", number)
        scans.append(tmp_path / f"{number}.nii.gz")
        write_volume(image, scans[-1])
    blank, _ = scan("b", 34)
    noise = np.random.default_rng(0).normal(20, 5, blank.shape).astype(np.int16)
    write_volume(blank.with_voxels(noise), tmp_path / "noise.nii.gz")
    plan = Plan(steps=25, learning_rate=1e-3, minutes=20)
    measured = adapt.adapt_to_own_masks(trained / "model", [*scans, tmp_path / "noise.nii.gz"], tmp_path / "out", plan)
    assert "noise.nii.gz" in capsys.readouterr().err
    assert measured["adapted_on"]["patients"] <= len(scans)
    assert measured["adapted_on"]["after"] >= measured["adapted_on"]["before"] > 0.8
    known_one = study / "raw/b/b-001/image.nii.gz"
    for name, value in {"ENOUGH": -1.0, "MOST_FORGOTTEN": 1.0}.items():
        monkeypatch.setattr(finetune, name, value)  # a version is written, whatever it is worth
    again = adapt.adapt_to_own_masks(trained / "model", [scans[0], known_one], tmp_path / "two", plan)
    digest = records.voxels_sha256(read_volume(scans[0]).canonical().voxels)[:SCAN_DIGITS]
    info = json.loads((tmp_path / "two/1/model.json").read_text())
    assert digest in scans_seen_by(info, "train") and digest not in scans_seen_by(info, "validation")
    assert again["adapted_on"]["patients"] == 1 and f"{known_one} has the voxels of" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"can be trusted to 0\.85, received 1 without"):
        adapt.adapt_to_own_masks(trained / "model", [tmp_path / "noise.nii.gz"], tmp_path / "none", plan)


@pytest.mark.parametrize("modality", [None, "CT"])
def test_own_masks_are_learned_from_as_the_model_will_see_the_scans(trained, in_study, tmp_path, modality, capfd):
    scans = []
    for number in range(30, 33):
        image, _ = scan("b", number)
        scans.append(tmp_path / f"{number}.mha")
        write_volume(image, scans[-1])
    (tmp_path / "notes.txt").write_text("no scan")
    cards, trusted = write_own_masks(
        Segmenter(trained / "model"), [*scans, tmp_path / "notes.txt"], tmp_path / "own", 0.5, modality
    )
    assert trusted == scans and "notes.txt" in capfd.readouterr().err  # one bad file costs that file alone
    (card,) = (load_card(path)[0] for path in cards)
    assert card.modality == (modality or "MR") and (card.task, card.classes) == ("volume", ["background", "organ"])
    for path, found in zip(scans, find_scans(*load_card(cards[0])), strict=True):
        own, image = read_image(found), read_volume(path)
        np.testing.assert_array_equal(own.voxels, image.voxels)
        np.testing.assert_allclose(own.affine, image.affine, atol=1e-4)
        assert read_labels(found, own).voxels.any()


def test_what_looks_like_a_ct_is_not_learned_from_until_it_is_said_to_be_one(trained, in_study, tmp_path, capsys):
    image, _ = scan("b", 30)
    like_ct = tmp_path / "like_ct.nii.gz"
    write_volume(image.with_voxels((image.voxels - 1000).astype(np.int16)), like_ct)
    segmenter = Segmenter(trained / "model")
    look(segmenter, [like_ct])
    assert f"{like_ct}: voxels look like Hounsfield units" in capsys.readouterr().err
    for modality, trusted in ((None, []), ("MR", [like_ct]), ("CT", [like_ct])):
        assert write_own_masks(segmenter, [like_ct], tmp_path / str(modality), 0.0, modality)[1] == trusted
    assert f"left aside until --modality says whether it is a CT: {like_ct}" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["9", "1"])
def test_a_signal_ends_it_without_a_version(trained, new_study, monkeypatch, tmp_path, capsys, steps):
    monkeypatch.chdir(new_study)
    monkeypatch.setattr(finetune, "ENOUGH", -1.0)
    checks = []

    def shown(items, label, total=None):
        for item in items:
            if label == "adapting" and item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    def check(*how):
        checks.append(how)
        if len(checks) == 2:  # the last one of a single step
            os.kill(os.getpid(), signal.SIGTERM)
        return {"left_out": 0.5, "adapted_on": 0.5, "known": 0.5}

    monkeypatch.setattr(finetune.command, "progress", shown)
    monkeypatch.setattr(finetune, "check", check)
    arguments = ["--model", str(trained / "model"), "--card", "cards/c.yaml", "-o", str(tmp_path / "out")]
    arguments += ["--steps", steps]
    assert adapt.main(arguments) == 1
    assert "interrupted; nothing is written and the model stays as it is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_half_copied_model_is_refused_before_anything_is_prepared(trained, new_study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(new_study)
    monkeypatch.setattr(adapt, "prepare", None)
    shutil.copytree(trained / "model", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/variables")
    for spoil in (lambda: None, lambda: (tmp_path / "half/model.json").write_text("{}")):
        spoil()
        assert adapt.main(["--model", str(tmp_path / "half"), "--card", "cards/c.yaml", "-o", "x"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "Expected a model that lvseg.export wrote, received" in line and str(tmp_path / "half") in line


def test_a_scan_stored_along_another_axis_is_no_other_scan(trained, in_study, tmp_path, capsys):
    image, _ = scan("a", 70)
    turned = Volume(image.voxels.transpose(2, 0, 1).copy(), image.affine[:, [2, 0, 1, 3]])
    scans = [tmp_path / "one.nii.gz", tmp_path / "turned.nii.gz"]
    for volume, path in zip((image, turned), scans, strict=True):
        write_volume(volume, path)
    segmenter = Segmenter(trained / "model")
    (one,), (other,) = (look(segmenter, [path]) for path in scans)
    np.testing.assert_allclose(one.features, other.features, atol=1e-6)
    (both,) = look(segmenter, scans)
    assert both.scan == scans[0] and f"{scans[1]} has the voxels of {scans[0]}" in capsys.readouterr().err
    _, trusted = write_own_masks(segmenter, [*scans, scans[0]], tmp_path / "own", 0.0)
    assert trusted == scans[:1]


def test_unsure_and_unlike_scans_are_suggested_first(trained, in_study, tmp_path):
    scans = []
    for name, made in {"plain": scan("a", 70), "again": scan("a", 71), "odd": dimmed(72)}.items():
        scans.append(tmp_path / f"{name}.nii.gz")
        write_volume(made[0], scans[-1])
    looked = look(Segmenter(trained / "model"), scans)
    doubts = {each.scan.name.split(".")[0]: each.doubt for each in looked}
    assert doubts["odd"] > max(doubts["plain"], doubts["again"])
    assert looked[suggest(looked, 1)[0]].scan.name == "odd.nii.gz"


def test_two_of_a_kind_are_not_suggested_together():
    here, there = np.array([0.0, 0.0, 1.0]), np.array([4.0, 1.0, 1.0])
    looked = [Look(Path(str(place)), doubt, features) for place, (doubt, features) in enumerate(
        [(0.5, here), (0.49, here + 0.01), (0.3, there), (0.1, there + 0.01)]
    )]  # fmt: skip
    assert suggest(looked, 2) == [0, 2]
    assert sorted(suggest(looked, 4)) == [0, 1, 2, 3]


def test_patients_are_left_out_only_where_there_are_enough():
    names = [f"p{number}" for number in range(20)]
    assert left_out(names[: LEAST_TO_LEAVE_OUT - 1]) == []
    assert len(left_out(names[:LEAST_TO_LEAVE_OUT])) == 1 and len(left_out(names)) == 5
    assert set(left_out(names[::-1])) == set(left_out(names))


@pytest.mark.parametrize(("fresh", "others", "deciding", "more"), [
    (3, 3, 0, 1),  # a study that grows by a few at a time
    (3, 1, 0, 1), (2, 3, 0, 1), (12, 12, 1, 5), (4, 12, 4, 0),
    (1, 9, 0, 0), (0, 8, 1, 0),  # somebody new has to be learned from
])  # fmt: skip
def test_a_quarter_of_a_study_that_grows_decides(fresh, others, deciding, more):
    names = [f"p{number}" for number in range(fresh)]
    assert len(left_out(names, others, deciding)) == more


def test_patients_that_can_be_simulated_are_so_only_to_be_replayed(trained, in_study, monkeypatch):
    made_by = {"scanner": "philips_volume", "patients": 40, "seed": 7}
    card = write_card(in_study, "made", simulate=made_by, labels={"organ": [1]}, mask="{patient}/mask.nii.gz")
    monkeypatch.setattr(replay, "REPLAYED", 2)
    monkeypatch.setattr(replay, "CHECKED", 1)
    names = [f"sim0007-{number:04d}" for number in range(1, 41)]
    split = {"train": names[20:30], "validation": names[33:], "test": names[:20]}
    data = adapt._experiment(adapt._info(trained / "model"), [card], QUICK).data
    strangers = {"train": names[20:21], "validation": [], "test": names[:20]}
    for cards, of_model, made in ((None, split, 3), ([card], split, 3), ([card], strangers, 3)):
        provenance = {"split": of_model}
        replayed, judging, _ = known(provenance, data, data, cards, set())
        there = {path.parent.name for path in (in_study / "raw/made").glob("*/truth.json")}
        assert there >= {*replayed.patients, *judging.patients} and not there & set(names[:20])
        if of_model is split:
            assert set(replayed.patients) <= set(split["train"]) and set(judging.patients) <= set(split["validation"])
        assert len(there) == made and len(judging.patients) >= 1 and len(replayed.patients) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("--card or --unlabelled", "neither")),
        (["--card", "cards/c.yaml"], ("--out",)),
        (["--card", "cards/c.yaml", "-o", "x", "--patients", "nobody"], ("nobody",)),
        (["--card", "cards/a.yaml", "-o", "x"], ("does not know", "a-0")),
        (["--card", "cards/c.yaml", "-o", "x", "--replay", "cards/gone.yaml"], ("gone.yaml", "--replay")),
        (["--card", "cards/c.yaml", "-o", "x", "--replay", "cards/c.yaml"], ("trained on", "cards/c.yaml")),
        (["--card", "cards/c.yaml", "-o", "cards/c.yaml"], ("--out to be a folder", "the file cards/c.yaml")),
        (["--unlabelled", "raw/c/c-020/image.nii.gz", "-o", "cards/c.yaml"], ("--out to be a folder", "the file")),
        (["--card", "cards/c.yaml", "-o", "x", "--steps", "0"], ("--steps of at least 1", "received 0")),
        (["--card", "cards/c.yaml", "-o", "x", "--minutes", "0"], ("--minutes above 0", "received 0")),
        (["--card", "cards/other.yaml", "-o", "x"], ("background, spleen", "cards/other.yaml")),
        (["--card", "cards/c.yaml", "-o", "x", "--replay", "cards/other.yaml"], ("background, spleen", "other.yaml")),
        (["--card", "cards/namesake.yaml", "-o", "x"], ("a name of its own", "set_a in cards/namesake.yaml")),
        (
            ["--unlabelled", "raw/c/c-020/image.nii.gz", "-o", "x", "--replay", "cards/other.yaml"],
            ("background, spleen", "other.yaml"),
        ),
        (
            ["--unlabelled", "raw/c/c-020/image.nii.gz", "--suggest", "1", "--replay", "cards/c.yaml"],
            ("--suggest or --replay", "both"),
        ),
        (["--unlabelled", "raw/c/c-020/image.nii.gz", "--suggest", "1", "--seed", "-1"], ("--seed", "received -1")),
        (["--unlabelled", "raw/c/c-020/image.nii.gz", "--suggest", "1", "--learning-rate", "1"], ("--learning-rate",)),
        (["--unlabelled", "raw/c/c-020/image.nii.gz", "--suggest", "1", "--patients", "c-020"], ("--patients",)),
        (["--card", "cards/c.yaml", "-o", "x", "--modality", "ct"], ("--modality", "--unlabelled")),
        (["--unlabelled", "cards/c.yaml", "--suggest", "1"], ("can be read", "none of 1")),
        (["--unlabelled", "raw/c/c-020/image.nii.gz", "--suggest", "2"], ("--suggest", "received 2")),
        (["--unlabelled", "raw/c/c-020/image.nii.gz", "--suggest", "1", "-o", "x"], ("--suggest or --out", "both")),
        (["--card", "cards/c.yaml", "-o", "runs/volume/small-fold0/model"], ("a folder of versions", "a model is")),
        (["--card", "cards/c.yaml", "-o", "cards/c.yaml/below/it"], ("--out to be a folder", "the file", "c.yaml")),
    ],
)
def test_wrong_use_is_one_sentence(trained, new_study, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(new_study)
    other = (new_study / "cards/c.yaml").read_text().replace("organ:", "spleen:")
    (new_study / "cards/other.yaml").write_text(other)
    namesake = (new_study / "cards/c.yaml").read_text().replace("set_c", "set_a")
    (new_study / "cards/namesake.yaml").write_text(namesake)
    assert adapt.main(["--model", str(trained / "model"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lvseg.adapt: Expected") and all(word in error for word in words)


def test_an_ensemble_and_an_older_model_cannot_be_adapted(trained, tmp_path):
    for change, word in (({"members": []}, "ensemble"), ({"experiment": None}, "earlier version")):
        card = json.loads((trained / "model/model.json").read_text()) | change
        card = {key: value for key, value in card.items() if value is not None}
        (tmp_path / "saved_model.pb").touch()
        (tmp_path / "model.json").write_text(json.dumps(card))
        with pytest.raises(InputError, match=word):
            adapt._info(tmp_path)
