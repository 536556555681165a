"""Mutations of what entries raise: what each would break, and the tests that see it."""

from mutants import Mutant

TESTS = "tests/test_errors_of_entries.py"

MUTANTS = [
    Mutant(
        name="errors_of_the_users_iterable_count_as_ours",
        file="tomepass/errors.py",
        old='getattr(error, "_of_the_user", False)',
        new="False",
        tests=f"{TESTS} -k users_iterable",
    ),
    Mutant(
        name="errors_of_the_unmerged_model_count_as_ours",
        file="tomepass/model/unmerged.py",
        old="    with the_models_own(model, call):\n        return call_with(model, call)",
        new="    return call_with(model, call)",
        tests=f"{TESTS} -k 'model_itself_raises and FailsLater'",
    ),
    Mutant(
        name="memory_that_ran_out_is_told_as_the_models_error",
        file="tomepass/model/unmerged.py",
        old="        if passes(error):\n            raise\n",
        new="",
        tests=f"{TESTS} -k memory_that_runs_out",
    ),
    Mutant(
        name="what_the_backend_makes_of_the_unmerged_model_counts_as_ours",
        file="tomepass/measuring/measure.py",
        old="lambda: the_models_own(model, call, reason)",
        new="lambda: compiling_merged(inner_name(inner))",
        tests=f"{TESTS} -k 'model_itself_raises and FailsCompiled'",
    ),
    Mutant(
        name="batches_of_another_kind_are_taken",
        file="tomepass/calibration/judging.py",
        old='if signature_of(model, call, "forward", form) != expected:',
        new="if False:",
        tests=f"{TESTS} -k 'odd_batches and another'",
    ),
    Mutant(
        name="batches_without_images_are_taken",
        file="tomepass/calibration/judging.py",
        old="if first is not None and not first.shape[0]:",
        new="if False:",
        tests=f"{TESTS} -k 'odd_batches and no_images or odd_batches and images'",
    ),
    Mutant(
        name="answers_of_nan_are_compared",
        file="tomepass/proof/check.py",
        old="if any(bool(value.isnan().any()) for value in outputs):",
        new="if False:",
        tests=f"{TESTS} -k 'answers_with_nan and check'",
    ),
    Mutant(
        name="nan_is_within_any_tolerance",
        file="tomepass/proof/replay.py",
        old='return float("inf") if math.isnan(error) else error',
        new="return error",
        tests=f"{TESTS} -k above_any_tolerance",
    ),
    Mutant(
        name="a_schedule_of_nan_is_chosen",
        file="tomepass/calibration/searching.py",
        old="        return math.inf if math.isnan(found) else found",
        new="        return 0.0 if math.isnan(found) else found",
        tests=f"{TESTS} -k overflows",
    ),
    Mutant(
        name="a_cache_is_tried_after_the_work",
        file="tomepass/calibration/measurements.py",
        old="                self._write()  # what",
        new="                pass  # what",
        tests=f"{TESTS} -k before_anything_is_measured",
    ),
    Mutant(
        name="errors_of_the_file_system_come_through",
        file="tomepass/calibration/measurements.py",
        old="    except (OSError, ValueError) as error:  # a",
        new="    except ZeroDivisionError as error:  # a",
        tests=f"{TESTS} -k 'cannot_be_used and folder'",
    ),
    Mutant(
        name="measurements_of_any_form_are_taken",
        file="tomepass/calibration/measurements.py",
        old="if not _fits(name, value, images, depth):",
        new="if False:",
        tests=f"{TESTS} -k 'broken_measurement and short'",
    ),
    Mutant(
        name="a_model_without_values_is_computed_with",
        file="tomepass/model/unmerged.py",
        old="(v.is_meta or isinstance(v, FakeTensor))",
        new="isinstance(v, FakeTensor)",
        tests=f"{TESTS} -k 'without_values and check'",
    ),
    Mutant(
        name="a_lazy_module_is_read",
        file="tomepass/handover/refusing.py",
        old="    if lazy:",
        new="    if False:",
        tests=f"{TESTS} -k lazy-explain",
    ),
    Mutant(
        name="a_module_of_torchscript_is_read",
        file="tomepass/handover/refusing.py",
        old="if isinstance(model, torch.jit.ScriptModule):",
        new="if False:",
        tests=f"{TESTS} -k scripted-explain",
    ),
    Mutant(
        name="a_copy_of_another_precision_parts_what_is_shared",
        file="tomepass/model/unmerged.py",
        old="if id(value) not in cast:",
        new="if True:",
        tests=f"{TESTS} -k another_precision",
    ),
    Mutant(
        name="a_compiled_part_is_not_looked_through",
        file="tomepass/capture/captured.py",
        old='getattr(value, name, value) if name == "_orig_mod" else getattr(value, name)',
        new="getattr(value, name)",
        tests=f"{TESTS} -k compiled_part",
    ),
]
