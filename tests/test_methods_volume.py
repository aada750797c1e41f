"""All sixteen combinations of the report's methods for liver volume, three slices a stack."""

import methods
import pytest


@pytest.mark.parametrize("combination", methods.COMBINATIONS, ids=methods.name)
def test_a_combination_trains_exports_loads_and_predicts(in_study, tmp_path, vgg11_file, combination):
    methods.run(in_study, tmp_path, "volume", 1, combination, vgg11_file)
