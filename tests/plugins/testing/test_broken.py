"""The kit catches each broken plugin, by the check that is about it, with a message that says what to do."""

from __future__ import annotations

import gc
import importlib
import re
from typing import Any

import pytest
from tests.plugins.testing import broken, conftest

from drivetrain import Callback, CallbackContext
from drivetrain_testing import CheckError, ConformanceError, checks_for, conformance

LAUNCHED = {"environment": {"TOY_RANK": "1"}}
# What is given to the kit, the check that must fail, what its message says is wrong, and what it says to do.
CASES: list[tuple[Any, str, str, str, dict[str, Any]]] = [
    (broken.NoHelp(), "options_have_help", "without a type or help: bare", r"option\(default=", {}),
    (broken.Doubles(), "options_survive", "size is 2 in one and 4 in the other", "give back what it is given", {}),
    (broken.Asserts(), "wrong_options_are_named", r"size = \S+ raises AssertionError", "raise ValueError", {}),
    (broken.Silent(), "describes_itself", "no docstring", "in one sentence", {}),
    (broken.Misspelt(), "hooks_are_known", "'on_step_ended', which is no hook. Did you mean 'on_step_end'", "hookspecs.py", {}),
    (broken.Fails(), "trains", "ValueError: out of order raised in on_step_end of callback:Fails", "make a run of a small", {}),
    (broken.Swallows(), "errors_name_the_plugin", "inside on_step_end is hidden: the run goes on", "by their types", {}),
    (broken.Replaces(), "errors_name_the_plugin", "inside on_step_end comes out as RuntimeError: sorry", "from error", {}),
    (broken.FallsApart(), "failures_pass_through", "it fails too: KeyError: 'eval/loss'", "look before reading", {}),
    (broken.KeepsSet(), "state_is_plain", "set at components/callback:KeepsSet/seen", "keep only dicts, lists", {}),
    (broken.ForgetsCount(), "resumes_bit_equal", "steps is 4 in one and 8 in the other", "nothing may start it afresh", {}),
    (broken.Hidden(), "resumes_bit_equal", "the run ends otherwise: model", r"fields made with state\(\)", {}),
    (broken.Hidden(), "a_killed_run_resumes_bit_equal", "the run ends otherwise: model", r"fields made with state\(\)", {}),
    (broken.ForgetsCount(), "a_killed_run_resumes_bit_equal", "steps is 4 in one and 8 in the other", "start it afresh", {}),
    (broken.ByRank(), "two_ranks_equal_one", "their weights differ", "ctx.strategy.sum", {}),
    (broken.MainOnly(), "two_ranks_equal_one", "a run on two ranks fails", "every rank must take part", {}),
    (broken.NoReduce(), "two_ranks_equal_one", "their weights differ", "ctx.strategy.sum", {}),
    (broken.Disturbs(), "leaves_training_alone", "with other weights", r"a torch\.Generator of your own", {}),
    (broken.DisturbsPython(), "leaves_training_alone", "uses up random numbers", r"random\.Random of your own", {}),
    (broken.SharesList(), "runs_share_nothing", "changes seen of the class", r"state\(factory=list\)", {}),
    (broken.Reads(), "steps_wait_for_no_device", r"Tensor\.item at testing/broken\.py:\d+", "on_log", {}),
    (broken.ReadsLoss(), "steps_wait_for_no_device", r"Tensor\.item at testing/broken\.py:\d+", "torch.where", {}),
    (broken.Moves(), "steps_wait_for_no_device", r"Tensor\.to at testing/broken\.py:\d+", "on_log", {}),
    (broken.Writes(), "steps_write_no_file", r"open '/dev/null' at testing/broken\.py:\d+", "ctx.is_main", {}),
    (broken.Collects(), "steps_call_no_collective", r"sum at testing/broken\.py:\d+", "on every rank", {}),
    (broken.Reduces(), "steps_call_no_collective", r"torch\.distributed: allreduce at testing/broken\.py", "on every rank", {}),
    (broken.GathersWeights(), "steps_call_no_collective", r"model_state at testing/broken\.py:\d+", "on every rank", {}),
    (broken.Busy(), "steps_cost_few_calls", r"adds 501 calls .* 200 are allowed", "_foreach_", {}),
    (broken.Ascends(), "lowers_the_loss", r"60 steps took the loss from [\d.]+ to", "sign of the update", {}),
    (broken.HoldsFrozen(), "every_parameter_is_in_one_group", "requires_grad = False", "self.parameter_groups", {}),
    (
        broken.OwnRate(),
        "options_of_groups_count",
        r"lr = 0 and weight_decay = 0 moved \(0\.weight\)",
        "not from the defaults",
        {},
    ),
    (broken.OwnRate(), "the_learning_rate_counts", r'although group\["lr"\] is 0', "in every step", {}),
    (broken.SqueezesGradient(), "parameters_without_gradient_stay", "stops the step: TypeError", "grad is None", {}),
    (broken.DecaysIdle(), "parameters_without_gradient_stay", "without gradient moves", "out of the decay", {}),
    (broken.NoClosure(), "closures_are_called", "does not call it", "torch.enable_grad", {}),
    (broken.SqueezesGradient(), "closures_are_called", "with gradients off", "torch.enable_grad", {}),
    (broken.LateRefusal(), "sparse_gradients_are_used_or_refused", "some weights have moved", "before the first update", {}),
    (
        broken.ObscureRefusal(),
        "sparse_gradients_are_used_or_refused",
        "a sparse gradient raises",
        "Make the embedding dense",
        {},
    ),
    (broken.IgnoresSparse(), "sparse_gradients_are_used_or_refused", "stay where they were", "or refuse it", {}),
    (broken.Widens(), "parameters_keep_their_types", "bfloat16 weights become another type", "which keeps the type", {}),
    (broken.Counts(), "schedules_are_pure", "asked twice it says", "keep no counter", {}),
    (broken.Divides(), "schedules_fit_every_length", "a run of 1 steps raises ZeroDivisionError", "can be 0", {}),
    (broken.OnceContext(), "precision_contexts_open_again", "cannot be entered again", "torch.autocast", {}),
    (broken.Thaws(), "precision_keeps_what_is_trained", "requires_grad of the parameters", r"model\.to", {}),
    (broken.NeverSkips(), "overflows_are_skipped", "is not skipped", "return False", {}),
    (broken.Alone(), "collectives_agree", "'sum': ", "ProcessGroupStrategy", {}),
    (broken.Prefixed(), "weights_keep_their_names", r"names such as \['module\.0", "without what wrapping adds", {}),
    (broken.EvenShares(), "partial_windows_are_exact", "two ranks ends .* away", "over all ranks", {}),
    (broken.OwnFormat(), "states_fit_other_strategies", "does not take a state of two ranks: ", "as one process", {}),
    (broken.NeedsStart(), "trackers_close_in_any_order", "close without start raises AttributeError", "nothing to close", {}),
    (broken.Idle(), "something_is_left_to_train", "none of 1 trainable parameters moves", "requires_grad set", {}),
    (broken.Unseeded(), "models_follow_the_seed", "builds different weights", "seeded for make_model", {}),
    (broken.Shuffled(), "samples_are_the_same_again", "it is another: sample 0", "from i alone", {}),
    (broken.NoHelpCommand(), "commands_explain_themselves", "its help is ''", "without a full stop", {}),
    (broken.PercentCommand(), "commands_explain_themselves", "its --help raises", "write % as %%", {}),
    (broken.ArgumentlessCommand(), "commands_can_run", r"run takes \(\)", "exit code", {}),
    (broken.always_there, "absent_launchers_are_not_seen", "in an empty environment", "return None", {"kind": "cluster"}),
    (broken.counts_from_one, "launchers_are_read", "rank 2 of 2", "count from 0", {"kind": "cluster", **LAUNCHED}),
    (broken.misspelt_preset, "presets_are_valid", "learning_rate: unknown key", "keys of TrainingConfig", {"kind": "preset"}),
    (broken.Unquoted(), "formats_give_back_what_they_write", "seed is '1' in one and 1", "quote texts", {}),
    (broken.named_device, "devices_are_torchs", "gives 'cpu'", "return torch.device", {"kind": "device"}),
    (broken.one_word_check, "checks_give_verdicts", "it gives True", r"\(ok, text, remedy\)", {"kind": "check"}),
    (broken.Sound(), "is_registered", "belongs to no installed distribution", "pip install -e", {}),
]


def failure(thing: Any, name: str, **setting: Any) -> str:
    (check,) = [check for check in checks_for(thing, **setting) if check.name == name]
    with pytest.raises(ConformanceError) as raised:
        check()
    return str(raised.value)


@pytest.mark.parametrize(
    ("thing", "name", "wrong", "remedy", "setting"),
    [pytest.param(*case, id=f"{getattr(case[0], '__name__', type(case[0]).__name__)}-{case[1]}") for case in CASES],
)
def test_a_broken_plugin_is_caught(thing: Any, name: str, wrong: str, remedy: str, setting: dict[str, Any]) -> None:
    message, _, advice = failure(thing, name, **setting).rpartition("→")
    assert re.search(wrong, message, re.DOTALL), message
    assert re.search(remedy, advice, re.DOTALL), advice


def test_what_raises_where_it_must_not_is_named_and_not_excused() -> None:
    """A check that cannot come to a verdict says so, whatever it is; `unsupported` is for verdicts alone."""
    for name in ("resumes_bit_equal", "steps_write_no_file", "state_is_plain"):
        (check,) = [check for check in checks_for(broken.Fails()) if check.name == name]
        with pytest.raises(
            CheckError, match=r"callback:Fails: \w+ came to no verdict: ValueError: out of order .*broken\.py:\d+"
        ):
            check()
    (row,) = [row for row in conformance(broken.Fails(), unsupported={"trains": "it fails"}).args[1] if row.id == "trains"]
    (mark,) = row.marks
    assert mark.kwargs["raises"] is ConformanceError and not issubclass(CheckError, ConformanceError)


def test_sound_plugins_pass() -> None:
    """The other half of every case above: what the broken ones would be without their mistake."""
    for thing in (broken.Sound(), broken.KeepsOnDevice(), broken.SoundOptimizer()):
        for check in checks_for(thing):
            if check.name not in ("is_registered", "requires_the_core_by_range", "has_a_licence", "is_typed") and (
                not re.search("killed|ranks|silence|sibling", check.name)  # which start processes, or read metadata
            ):
                check()


class Busy:
    """Is collected with a thousand calls."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        for _ in range(1000):
            len("")


class Litters(Callback):
    def on_step_start(self, ctx: CallbackContext) -> None:
        Busy()


@pytest.mark.parametrize("automatic", [True, False])
def test_garbage_that_is_collected_in_a_step_is_not_counted(automatic: bool) -> None:
    """It may be another test's; and the collector is afterwards as it was."""
    (check,) = [check for check in checks_for(Litters()) if check.name == "steps_cost_few_calls"]
    before, was_enabled = gc.get_threshold(), gc.isenabled()
    gc.set_threshold(1)
    (gc.enable if automatic else gc.disable)()
    try:
        check()
        assert gc.isenabled() == automatic
    finally:
        gc.set_threshold(*before)
        (gc.enable if was_enabled else gc.disable)()


GOOD = conftest.GOOD
COMPONENT = conftest.COMPONENT
PUBLISHED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"more": "License-Expression: MIT\n"}, "requires_the_core_by_range", "does not require drivetrain-core", "dependencies"),
    ({"more": GOOD.replace(">=0.1,<1", "==0.1.0")}, "requires_the_core_by_range", "'drivetrain-core==0.1.0'", "with both ends"),
    ({"more": GOOD.replace(">=0.1,<1", ">=0.1")}, "requires_the_core_by_range", "'drivetrain-core>=0.1'", "with both ends"),
    ({"more": GOOD.partition("\n")[2]}, "has_a_licence", "names no licence", "SPDX"),
    ({"typed": False}, "is_typed", "has no py.typed", "beside __init__.py"),
    ({"target": "component"}, "is_registered", "no entry point of the group drivetrain.callback leads to Thing", ":Thing"),
    ({"code": f"{COMPONENT}\ndef late():\n    import other_plugin\n"}, "imports_no_sibling", "imports other_plugin", "core|library"),
    ({"code": f"{COMPONENT}\nprint('hello')\n"}, "imports_in_silence", "prints hello", "nothing but define"),
    ({"code": f"{COMPONENT}\nimport logging; logging.basicConfig()\n"}, "imports_in_silence", "configures logging", "application's"),
    ({"code": f"import torch\nif not torch.cuda.is_available() and __name__ in __import__('sys').modules and "
      f"__import__('os').environ.get('CUDA_VISIBLE_DEVICES') == '':\n    raise RuntimeError('no device')\n{COMPONENT}"},
     "imports_in_silence", "cannot be imported where there is no GPU", "ctx.device"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "name", "wrong", "remedy"), PUBLISHED)
def test_a_broken_distribution_is_caught(publish: Any, given: dict[str, Any], name: str, wrong: str, remedy: str) -> None:
    publish("other_plugin")
    importlib.import_module("other_plugin")
    package = f"broken_plugin_{PUBLISHED.index((given, name, wrong, remedy))}"
    publish(package, **given)
    message, _, advice = failure(importlib.import_module(package).Thing(), name).rpartition("→")
    assert wrong in message
    assert re.search(remedy, advice), advice


def test_every_check_is_shown_a_plugin_that_breaks_it() -> None:
    from drivetrain_testing import kit

    checks_for(broken.Sound())
    shown = {name for _, name, *_ in CASES} | {name for _, name, *_ in PUBLISHED}
    assert set(kit._CHECKS) == shown
    assert len(shown) >= 25
