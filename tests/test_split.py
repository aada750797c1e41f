"""The split by patient: fixed by the id, the same under every scanner, and never silently empty."""

import pytest
import yaml

from lvseg.errors import InputError
from lvseg.split import split_patients, uniform

PATIENTS = [f"p{number:03d}" for number in range(200)]


def test_every_patient_is_in_exactly_one_part_and_folds_cover_the_rest():
    validated = []
    for fold in range(5):
        split = split_patients({"a": PATIENTS}, 5, fold, 0.11)
        assert sorted(split.train + split.validation + split.test) == PATIENTS
        assert not set(split.train) & set(split.validation) | set(split.test) & set(split.train)
        validated += split.validation
    assert sorted(validated) == sorted(set(PATIENTS) - set(split.test))


def test_adding_patients_moves_nobody():
    before = split_patients({"a": PATIENTS}, 5, 2, 0.11)
    after = split_patients({"a": PATIENTS, "b": [f"new{number}" for number in range(300)]}, 5, 2, 0.11)
    assert set(before.test) <= set(after.test) and set(before.validation) <= set(after.validation)
    assert set(before.train) <= set(after.train)


def test_one_patient_under_two_scanners_goes_one_way():
    split = split_patients({"a": PATIENTS, "b": PATIENTS[50:]}, 5, 0, 0.2)
    assert len(split.train) + len(split.validation) + len(split.test) == len(PATIENTS)


def test_shares_are_near_the_fractions_asked_for():
    many = [f"patient {number}" for number in range(5000)]
    split = split_patients({"a": many}, 10, 0, 0.11)
    assert abs(len(split.test) / 5000 - 0.11) < 0.02  # 4.5 standard deviations
    assert abs(len(split.validation) / 4450 - 0.1) < 0.02
    assert abs(sum(uniform(patient, "other") for patient in many) / 5000 - 0.5) < 0.02


def test_named_test_patients_override_the_hash():
    split = split_patients({"a": PATIENTS}, 5, 0, 0.11, test_patients=["p007", "p100"])
    assert split.test == ("p007", "p100")


def test_folds_file_overrides_the_hash(tmp_path):
    path = tmp_path / "folds.yaml"
    path.write_text(yaml.safe_dump({"folds": [["p1", "p2"], ["p3"]]}))
    split = split_patients({"a": ["p1", "p2", "p3", "p4"]}, 2, 1, 0.1, ["p4"], str(path))
    assert (split.train, split.validation, split.test) == (("p1", "p2"), ("p3",), ("p4",))


def test_a_folds_file_may_list_all_of_a_study(tmp_path):
    path = tmp_path / "folds.yaml"
    path.write_text(yaml.safe_dump({"folds": [["p1", "p2"], ["p3", "p4"]]}))
    split = split_patients({"a": ["p1", "p2", "p3", "p4"]}, 2, 1, 0.1, ["p4"], str(path))
    assert (split.train, split.validation, split.test) == (("p1", "p2"), ("p3",), ("p4",))


def test_a_fold_of_nothing_but_test_patients_is_empty(tmp_path):
    path = tmp_path / "folds.yaml"
    path.write_text(yaml.safe_dump({"folds": [["p1", "p2"], ["p3"]]}))
    with pytest.raises(InputError, match=r"received none in fold 1 of 2 but those of the test set in .*folds\.yaml"):
        split_patients({"a": ["p1", "p2", "p3"]}, 2, 0, 0.1, ["p3"], str(path))


def test_ids_that_yaml_takes_for_numbers_are_told(tmp_path):
    path = tmp_path / "folds.yaml"
    path.write_text("folds: [[1, 2], [3, 4]]")
    with pytest.raises(InputError, match=r"Expected patient ids in quotes, received the int 1 in .*folds\.yaml"):
        split_patients({"a": ["1", "2", "3", "4"]}, 2, 0, 0.0, None, str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"a": PATIENTS, "b": ["x1", "x2"]}, 5, 0, 0.11, ["p001"]), ("test patients", "b")),
        (({"a": PATIENTS, "b": ["x1", "x2", "x1"]}, 5, 0, 0.11, ["p001"]), ("none of the 2 of b",)),
        (({"a": PATIENTS[:3]}, 10, 0, 0.0), ("fold",)),
        (({"a": PATIENTS}, 5, 0, 0.1, ["nobody"]), ("nobody", "data.test_patients")),
    ],
)
def test_a_split_that_cannot_be_is_an_error_that_says_so(arguments, words):
    with pytest.raises(InputError) as error:
        split_patients(*arguments)
    assert error.value.code == "BAD_SPLIT" and all(word in error.value.sentence for word in words)


@pytest.mark.parametrize("folds", [[["p1"], ["p1"]], [["p1"], ["p2", "stranger"]], [["p1"], []], [["p1"]]])
def test_a_folds_file_with_holes_is_refused(tmp_path, folds):
    path = tmp_path / "folds.yaml"
    path.write_text(yaml.safe_dump({"folds": folds}))
    with pytest.raises(InputError, match=r"folds\.yaml|fold 1"):
        split_patients({"a": ["p1", "p2"]}, 2, 0, 0.0, None, str(path))


@pytest.mark.parametrize(
    ("text", "received"),
    [("folds: [[p1], [p2], []]", "3 items"), ("folds: [p1]", "1 items"), ("other: 1", "none"), ("folds: 2", "2")],
)
def test_a_folds_file_of_another_form_is_told_with_what_it_has(tmp_path, text, received):
    path = tmp_path / "folds.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"with 2 lists of patient ids .*, received {received} in .*folds\.yaml"):
        split_patients({"a": ["p1", "p2"]}, 2, 0, 0.0, None, str(path))
