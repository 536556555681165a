"""Mutations of the ways in and out: module, backend, export, saving."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="on_unmatched_is_ignored_by_apply",
        file="tomepass/module.py",
        old='        if on_unmatched == "raise":\n            raise refusal',
        new="        if on_unmatched:\n            raise refusal",
        tests="tests/test_module.py -k warn",
    ),
    Mutant(
        name="outputs_are_ignored_by_apply",
        file="tomepass/module.py",
        old="rewritten = rewrite(capture.graph, planned, outputs=outputs)",
        new="rewritten = rewrite(capture.graph, planned)",
        tests="tests/test_module.py -k outputs_merged",
    ),
    Mutant(
        name="a_model_may_be_merged_twice",
        file="tomepass/module.py",
        old="    if isinstance(model, MergedModel):\n        raise TomeError(",
        new="    if False:\n        raise TomeError(",
        tests="tests/test_module.py -k twice",
    ),
    Mutant(
        name="an_input_given_twice_is_taken_once",
        file="tomepass/calls.py",
        old="            if name in given:\n                raise TypeError",
        new="            if False:\n                raise TypeError",
        tests="tests/test_module.py -k twice",
    ),
    Mutant(
        name="resolutions_share_a_capture",
        file="tomepass/captures.py",
        old=("return (batched, tuple(int(s) for s in sizes), value.dtype, _device(value))"),
        new="return (batched, len(sizes), value.dtype, _device(value))",
        tests="tests/test_module.py -k each_resolution",
    ),
    Mutant(
        name="modes_share_a_capture",
        file="tomepass/guards.py",
        old='_NOT_READ = ("__dict__", "__class__")',
        new='_NOT_READ = ("__dict__", "__class__", "training")',
        tests="tests/test_module.py -k follow_the_mode",
    ),
    Mutant(
        name="copies_leave_the_method_behind",
        file="tomepass/module.py",
        old="return _rebuild, (tome.model, tome.method, ",
        new="return _rebuild, (tome.model, ToMe(), ",
        tests="tests/test_module.py -k copies",
    ),
    Mutant(
        name="the_backend_ignores_on_unmatched",
        file="tomepass/backend.py",
        old=(
            '        if self.on_unmatched == "raise":\n            raise refusal or report.refusal()'
        ),
        new="        if self.on_unmatched:\n            raise refusal or report.refusal()",
        tests="tests/test_backend.py -k warn",
    ),
    Mutant(
        name="the_backend_ignores_outputs",
        file="tomepass/backend.py",
        old="rewritten = rewrite(captured, planned, outputs=self.outputs)",
        new="rewritten = rewrite(captured, planned)",
        tests="tests/test_backend.py -k outputs_merged",
    ),
    Mutant(
        name="unknown_options_are_taken",
        file="tomepass/backend.py",
        old="if unknown := sorted(set(others) - set(of_method)):",
        new=(
            "others = {k: v for k, v in others.items() if k in of_method}\n"
            "        if unknown := sorted(set(others) - set(of_method)):"
        ),
        tests="tests/test_backend.py -k unknown_option",
    ),
    Mutant(
        name="another_resolution_is_the_same_graph",
        file="tomepass/capture.py",
        old="symbolic = [int(size) for size in sizes if isinstance(size, torch.SymInt)]",
        new="symbolic: list[int] = []",
        tests="tests/test_backend.py -k another_resolution",
    ),
    Mutant(
        name="a_graph_is_merged_twice",
        file="tomepass/backend.py",
        old="if any(is_overhead(node) for node in captured.graph.nodes):",
        new="if False:",
        tests="tests/test_backend.py -k twice",
    ),
    Mutant(
        name="a_batch_of_one_is_captured",
        file="tomepass/batches.py",
        old="return torch.cat([value[:1], value[-1:]]).detach()",
        new="return value[:1].detach()",
        tests="tests/test_module.py -k first_call_with_one",
    ),
    Mutant(
        name="exports_keep_our_operators",
        file="tomepass/exporting.py",
        old="program = program.run_decompositions({**COMPOSITES, **FOR_RUNTIMES})",
        new="program = program.run_decompositions({**FOR_RUNTIMES})",
        tests="tests/doors/test_exporting.py -k pytorchs_own",
    ),
    Mutant(
        name="what_has_no_converter_is_exported",
        file="tomepass/exporting.py",
        old="            if schema.name in _WITHOUT_CONVERTER:",
        new="            if False:",
        tests="tests/doors/test_exporting.py -k without_a_converter",
    ),
    Mutant(
        name="exports_name_files",
        file="tomepass/exporting.py",
        old=('_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")'),
        new='_TRACES = ("torch_fn",)',
        tests="tests/doors/test_exporting.py -k names_no_file",
    ),
    Mutant(
        name="exports_are_long",
        file="tomepass/exporting.py",
        old="            outputs = model._tome.outputs\n",
        new="            outputs = None\n",
        tests="tests/doors/test_exporting.py -k outputs_of_an_applied",
    ),
    Mutant(
        name="saving_leaves_the_method_behind",
        file="tomepass/saving.py",
        old="    write_whole(Path(directory) / FILE",
        new="    _ = (Path(directory) / FILE",
        tests="tests/doors/test_saving.py -k comes_back_as_it_was",
    ),
    Mutant(
        name="saving_forgets_the_outputs",
        file="tomepass/saving.py",
        old='"method": method.to_dict(), "outputs": outputs}',
        new='"method": method.to_dict(), "outputs": "original"}',
        tests="tests/doors/test_saving.py -k comes_back_too",
    ),
    Mutant(
        name="what_was_saved_goes_before_what_is_asked_for",
        file="tomepass/saving.py",
        old='**{"outputs": outputs, **options}',
        new='**{**options, "outputs": outputs}',
        tests="tests/doors/test_saving.py -k comes_back_too",
    ),
    Mutant(
        name="a_later_version_is_read",
        file="tomepass/saving.py",
        old='if (version := data.get("version")) != VERSION:',
        new='if (version := data.get("version")) is None:',
        tests="tests/doors/test_saving.py -k cannot_be_read",
    ),
    Mutant(
        name="images_come_back_in_the_order_of_budgets",
        file="tomepass/adaptive.py",
        old="torch.cat(places).argsort(), [len(p)",
        new="torch.arange(images), [len(p)",
        tests="tests/test_adaptive.py -k 'keep_their_order or neighbours'",
    ),
    Mutant(
        name="images_go_to_the_next_budget",
        file="tomepass/adaptive.py",
        old="torch.bucketize(found, limits.to(found.device), right=True)",
        new="2 - torch.bucketize(found, limits.to(found.device), right=True)",
        tests="tests/test_adaptive.py -k more_redundant",
    ),
    Mutant(
        name="a_token_is_most_like_itself",
        file="tomepass/adaptive.py",
        old="return cosines.masked_fill(alone, -1.0).amax(-1).mean(-1)",
        new="return cosines.amax(-1).mean(-1)",
        tests="tests/test_adaptive.py -k redundancy",
    ),
]
