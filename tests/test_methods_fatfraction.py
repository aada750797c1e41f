"""All sixteen combinations of the report's methods for fat fraction, nine slices a stack."""

import methods
import pytest


@pytest.mark.parametrize("combination", methods.COMBINATIONS, ids=methods.name)
def test_a_combination_trains_exports_loads_and_predicts(in_study, tmp_path, vgg11_file, combination):
    methods.run(in_study, tmp_path, "fatfraction", 4, combination, vgg11_file)
