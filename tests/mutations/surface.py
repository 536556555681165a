"""Mutations of the public surface: errors and their kinds, keywords, what a merged model adds."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="an_error_travels_as_the_plain_one",
        file="tomepass/errors.py",
        old="return _rebuild, (known, self.reason, fields)",
        new="return _rebuild, (TomeError, self.reason, fields)",
        tests="tests/test_kinds_of_errors.py -k travels",
    ),
    Mutant(
        name="counts_that_do_not_fit_are_no_value_error",
        file="tomepass/planning/streams.py",
        old="class CountsRefused(Refused, ValueError):",
        new="class CountsRefused(Refused):",
        tests="tests/test_kinds_of_errors.py -k value_error",
    ),
    Mutant(
        name="the_short_stream_is_not_named",
        file="tomepass/planning/streams.py",
        old='which = f"stream {number} of {streams}" if streams > 1 else "its one stream"',
        new='which = "its one stream"',
        tests="tests/test_kinds_of_errors.py -k several",
    ),
    Mutant(
        name="a_backend_that_warns_swallows_counts_that_do_not_fit",
        file="tomepass/handover/compiling/backend.py",
        old="except (_AlreadyMergedError, CountsRefused):",
        new="except _AlreadyMergedError:",
        tests="tests/test_kinds_of_errors.py -k backend",
    ),
    Mutant(
        name="an_untrained_method_is_refused_as_a_model_is",
        file="tomepass/methods/learned/policies.py",
        old='            raise NotTrained(\n                f"{name} scores tokens',
        new='            raise TomeError(\n                f"{name} scores tokens',
        tests="tests/test_kinds_of_errors.py -k 'kind and policy'",
    ),
    Mutant(
        name="a_blind_line_counts_as_proved",
        file="tomepass/proof/report.py",
        old="return self.ok and not self.unproved",
        new="return self.ok",
        tests="tests/proof/test_proved.py -k named",
    ),
    Mutant(
        name="all_checks_pass_whatever_was_blind",
        file="tomepass/proof/report.py",
        old="    if report.unproved:\n",
        new="    if report.unproved and failed:\n",
        tests="tests/proof/test_proved.py -k named",
    ),
    Mutant(
        name="what_the_next_line_decides_is_unproved",
        file="tomepass/proof/report.py",
        old=" and not line.followed)",
        new=")",
        tests="tests/proof/test_proved.py -k decides",
    ),
    Mutant(
        name="a_merged_models_own_method_hides_a_target",
        file="tomepass/methods/asked.py",
        old="if standing is not None and not given else",
        new="if standing is not None and r is None else",
        tests="tests/handover/test_asked.py -k keeps_its_method",
    ),
    Mutant(
        name="a_target_beside_a_method_is_forgotten",
        file="tomepass/methods/asked.py",
        old="    if given:\n",
        new="    if r is not None:\n",
        tests="tests/handover/test_asked.py -k 'together or vain'",
    ),
    Mutant(
        name="explain_forgets_a_target",
        file="tomepass/handover/applying.py",
        old="        method, r, keep_rate=keep_rate, macs=macs, speedup=speedup, standing=standing\n",
        new="        method, r, keep_rate=keep_rate, macs=macs, standing=standing\n",
        tests="tests/handover/test_asked.py -k short_for",
    ),
    Mutant(
        name="several_graphs_report_of_none",
        file="tomepass/handover/adaptive.py",
        old='    _tome_graphs = "several"\n',
        new='    _tome_graphs = "one"\n',
        tests="tests/test_typing.py",
    ),
]
