"""Mutations of standing in for a model: what each would break, and the tests that see it."""

from __future__ import annotations

from mutants import Mutant

MUTANTS = [
    Mutant(
        name="a_replica_reads_the_first_models_weights",
        file="tomepass/handover/standing_in/wrapping.py",
        old='"_tome": replace(self._tome, model=model)',
        new='"_tome": replace(self._tome)',
        tests="tests/handover/test_wrapping.py -k replica",
    ),
    Mutant(
        name="attributes_are_written_beside_the_model",
        file="tomepass/handover/standing_in/wrapping.py",
        old="        return own is None or isinstance(own,",
        new="        return True or isinstance(own,",
        tests="tests/handover/test_wrapping.py -k written_to_the_model",
    ),
    Mutant(
        name="names_of_the_model_are_shadowed",
        file="tomepass/handover/standing_in/wrapping.py",
        old="        if has_own(merged._tome.model, self.name):\n",
        new="        if False:\n",
        tests="tests/handover/test_wrapping.py -k names_are_the_models",
    ),
    Mutant(
        name="methods_run_on_the_unmerged_model",
        file="tomepass/handover/standing_in/bypass.py",
        old="    return types.MethodType(function.__func__, merged) if own else function\n",
        new="    return function\n",
        tests="tests/handover/test_bypass.py -k call_the_forward",
    ),
    Mutant(
        name="attention_beside_the_forward_is_not_seen",
        file="tomepass/handover/standing_in/bypass.py",
        old="        if func in _ATTENTION:\n            watch.attends = True\n",
        new="        if func in _ATTENTION:\n            watch.attends = False\n",
        tests="tests/handover/test_bypass.py -k attends_on_its_own",
    ),
    Mutant(
        name="what_the_model_recomputes_is_kept",
        file="tomepass/handover/applied.py",
        old="        if self.recomputed is not None and torch.is_grad_enabled():\n",
        new="        if self.recomputed is not None and not torch.is_grad_enabled():\n",
        tests="tests/handover/test_trainers.py -k model_recomputes",
    ),
    Mutant(
        name="reentrant_checkpoints_lose_gradients",
        file="tomepass/capture/dialect.py",
        old=" and not is_reentrant(inner.nodes)",
        new="",
        tests="tests/handover/test_trainers.py -k model_recomputes",
    ),
    Mutant(
        name="tracing_is_not_seen",
        file="tomepass/model/calls.py",
        old="torch._C._get_tracing_state() is not None",
        new="False",
        tests="tests/handover/test_wrapping.py -k tracing",
    ),
]
