import csv
import json

import pytest

from lvseg import compare

FIELDS = ("dataset", "patient", "study", "class", "dice", "hausdorff_95_mm", "volume_error_percent")


def write(folder, dice, errors=None, patients=None):
    folder.mkdir(parents=True)
    with (folder / "patients.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(FIELDS)
        for index, value in enumerate(dice):
            name = patients[index] if patients else f"p{index}"
            table.writerow(
                ["ge", name, "1", "liver", value, "" if index == 0 else 5.0, errors[index] if errors else ""]
            )
    return folder


def test_differences_are_second_minus_first_patient_by_patient(tmp_path, capsys):
    first = write(tmp_path / "a/report", [0.90, 0.92, 0.95, 0.97, 0.93, 0.94], [-4, 2, 1, -1, 3, 5])
    second = write(tmp_path / "b", [0.93, 0.94, 0.95, 0.96, 0.95, 0.97], [2, 2, 1, 1, -2, 5])
    assert compare.main([str(first.parent), str(second), "--json", str(tmp_path / "found.json")]) == 0
    found = {result["measure"]: result for result in json.loads((tmp_path / "found.json").read_text())}
    assert set(found) == {"dice", "hausdorff_95_mm", "volume_error_percent"}
    assert found["dice"]["mean_difference"] == pytest.approx(0.09 / 6)
    assert found["dice"]["better"] == 4 and found["dice"]["worse"] == 1
    assert found["hausdorff_95_mm"]["n"] == 5  # the first patient has none
    # By size: 4, 2, 1, 1, 3, 5 against 2, 2, 1, 1, 2, 5.
    assert found["volume_error_percent"]["mean_difference"] == pytest.approx(-3 / 6)
    assert (
        found["volume_error_percent"]["better"] == 2 and found["volume_error_percent"]["worse"] == 0
    )  # less is better
    shown = {line.split("   ")[0]: line.split()[-8:] for line in capsys.readouterr().out.splitlines()}
    assert shown["liver, Dice"][0] == "6" and shown["liver, 95 % Hausdorff distance (mm)"][0] == "5"


def test_what_one_run_alone_has_is_counted_and_told(tmp_path, capsys):
    """A liver that a run misses has no distance, and would make its mean better."""
    first, second = (write(tmp_path / name, [0.9] * 4, [1, 2, 3, 4]) for name in "ab")
    table = (second / "patients.csv").read_text().replace("p2,1,liver,0.9,5.0,", "p2,1,liver,0.9,,")
    (second / "patients.csv").write_text(table)
    assert compare.main([str(first), str(second)]) == 0
    assert "liver, 95 % Hausdorff distance (mm): 1 scans have it in the first alone" in capsys.readouterr().out
    found = {result["measure"]: result for result in compare.compare(second, first)}
    assert [found["hausdorff_95_mm"][key] for key in ("only_first", "only_second", "n")] == [0, 1, 2]
    (second / "patients.csv").write_text(table.replace(",5.0,", ",,"))  # a run that misses every liver
    assert compare.main([str(first), str(second), "--json", str(tmp_path / "found.json")]) == 0
    assert "liver, 95 % Hausdorff distance (mm): 3 scans have it in the first alone" in capsys.readouterr().out
    (none,) = (each for each in json.loads((tmp_path / "found.json").read_text()) if not each["n"])
    assert (none["measure"], none["only_first"]) == ("hausdorff_95_mm", 3)


@pytest.mark.parametrize(("change", "word"), [(("0.9", "nan"), "nan"), (("liver,0.9,,1", "liver,0.9,,inf"), "inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, capsys, change, word):
    first, second = (write(tmp_path / name, [0.9] * 3, [1, 2, 3]) for name in "ab")
    (second / "patients.csv").write_text((second / "patients.csv").read_text().replace(*change, 1))
    assert compare.main([str(first), str(second)]) == 2
    assert f"received {word} for patient p0 in {second}" in capsys.readouterr().err  # which of the two


def test_evaluations_against_other_true_masks_are_refused(tmp_path, capsys):
    first, second = (write(tmp_path / name, [0.9] * 3) for name in "ab")
    for folder, voxels in ((first, 1000), (second, 2000)):
        lines = (folder / "patients.csv").read_text().splitlines()
        text = "\n".join([lines[0] + ",true_voxels", *(f"{line},{voxels}" for line in lines[1:])])
        (folder / "patients.csv").write_text(text)
    assert compare.main([str(first), str(second)]) == 2
    assert "received 1000 and 2000 voxels of ge p0" in capsys.readouterr().err


@pytest.mark.parametrize("patients", [["p0", "p1"], ["p0", "p1", "p9"]])
def test_other_scans_are_refused(tmp_path, capsys, patients):
    first = write(tmp_path / "a", [0.9, 0.9, 0.9])
    second = write(tmp_path / "b", [0.9] * len(patients), patients=patients)
    assert compare.main([str(first), str(second)]) == 2
    assert "Expected two evaluations of the same scans, received ge p" in capsys.readouterr().err


def test_what_was_not_evaluated_is_told(tmp_path, capsys):
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "run lvseg.evaluate first" in capsys.readouterr().err
    (tmp_path / "patients.csv").write_text("a,b\n1,2\n")
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "Expected rows that lvseg.evaluate wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "in UTF-8"),
        (b"dataset,patient,study,class,dice\na,p,1,liver,good\n", "could not convert string to float: 'good'"),
        (b"dataset,patient,study,class,dice\na,p,1,liver,1\na,p,1,liver,0\n", "received two of one"),
        (b"dataset,patient,study,class,dice\na,p,1,liver,1\na,q\n", "of one length, received another in row 2 of"),
        (b"dataset,patient,study,class,dice,hausdorff_95_mm\na,p,1,liver,1\n", "received another in row 1 of"),
        (b"dataset,patient,study,class,dice\na,p,1,liver,0,5\n", "received another in row 1 of"),
    ],
)
def test_broken_tables_are_one_sentence(tmp_path, capsys, content, said):
    (tmp_path / "patients.csv").write_bytes(content)
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
