"""The pytest plugin: hooks only. Each decides whether there is anything to do; other modules do it.

Most sessions of an environment do not use LoRA, so nothing is imported here but the options and the fixtures.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.plugin.fixtures import _lora_base_guard as _lora_base_guard
from pytest_lora.plugin.fixtures import lora_base_model as lora_base_model
from pytest_lora.plugin.fixtures import lora_batch as lora_batch
from pytest_lora.plugin.fixtures import lora_config as lora_config
from pytest_lora.plugin.fixtures import lora_device as lora_device
from pytest_lora.plugin.fixtures import lora_expect as lora_expect
from pytest_lora.plugin.fixtures import lora_model as lora_model
from pytest_lora.plugin.fixtures import lora_rank_sweep as lora_rank_sweep
from pytest_lora.plugin.options import (
    ADAPTER_FILES,
    GPU_PROPERTY,
    MARKERS,
    add_options,
    any_set,
    may_use_gpu,
    recorded,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_lora.plugin.session_options import LoraOptions

_REPORT = "lora_report"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the flags and the ini values."""
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Before anything is imported: refuse adapters with code beside them, and pin an xdist worker to its GPU."""
    if early_config.known_args_namespace.lora_demo:
        early_config.known_args_namespace.noconftest = True
    if any(name in arg for arg in args for name in ADAPTER_FILES):
        from pytest_lora.plugin import adapter_items

        adapter_items.refuse_code_beside_adapters(args)
    if any(arg.endswith("::recipe") for arg in args):
        from pytest_lora.plugin import recipe_items

        recipe_items.refuse_code_beside_recipes(args)
    if "PYTEST_XDIST_WORKER" in os.environ:
        from pytest_lora.plugin.option_values import asks_for_gpus

        if asks_for_gpus(early_config):
            from pytest_lora.plugin.gpu import devices

            devices.pin_early(early_config)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, read the options once, and make saved adapters test items where they are named."""
    if str(config.getoption("--hypothesis-profile", None)).startswith("lora-"):
        _register_profiles()
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    is_worker = hasattr(config, "workerinput")
    if not is_worker and "pytest_lora.plugin.gpu.devices" in sys.modules:
        from pytest_lora.plugin.gpu import devices

        devices.unpin(config)
    names_adapters = any(name in arg for arg in config.args for name in ADAPTER_FILES)
    if names_adapters or any_set(config):
        from pytest_lora.plugin.session_options import options_of

        options = options_of(config)
        _enable(config, options, names_adapters=names_adapters)
        if not is_worker:
            _enable_in_controller(config, options)


def _register_profiles() -> None:
    """Hypothesis loads the profile in its own pytest_configure, before any test could have registered it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytest_lora.strategies.models import register_profiles

    register_profiles()


def _enable(config: pytest.Config, options: LoraOptions, *, names_adapters: bool) -> None:
    """What the options ask of every process of a session."""
    if options.bases:
        from pytest_lora.inspection import public_bases

        public_bases.declared.update(options.bases)
        config.add_cleanup(public_bases.declared.clear)
    if options.select or options.ignore or options.strict:
        from pytest_lora.plugin import selections

        selections.enable(config)
    if options.recipes:
        from pytest_lora.plugin import recipe_items

        recipe_items.enable(config, options.recipes)
    if options.adapters or names_adapters:
        from pytest_lora.plugin import adapter_items

        adapter_items.enable(config, options.adapters)


def _enable_in_controller(config: pytest.Config, options: LoraOptions) -> None:
    """What the options ask of the process that has all reports."""
    if options.baseline:
        from pytest_lora.plugin import baseline_gate

        gate = baseline_gate.BaselineGate(options.baseline, update=options.update_baseline)
        config.pluginmanager.register(gate, "lora-baseline")
    if options.require_gpu:
        from pytest_lora.plugin.gpu import report as gpu_report

        config.pluginmanager.register(gpu_report.RequireGpu(), "lora-require-gpu")
    if options.reports and not config.option.collectonly:
        from pytest_lora.plugin import session_report

        config.pluginmanager.register(
            session_report.SessionReport(config, options.reports), "lora-session-report"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Print what ``--lora-rules``, ``--lora-explain``, ``--lora-show-recipe`` or ``--lora-demo`` asks for."""
    if config.getoption("lora_demo"):
        from pytest_lora.plugin import demo

        return demo.show(config)
    if config.getoption("lora_show_recipe"):
        from pytest_lora.plugin import printed_pages

        return printed_pages.show_recipe(config)
    if not (config.getoption("lora_rules") or config.getoption("lora_explain")):
        return None
    from pytest_lora.plugin import printed_pages

    return printed_pages.show_rules(config)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Refuse a mark that says nothing, where its test is collected."""
    made = yield
    for item in made if isinstance(made, list) else ():
        if isinstance(item, pytest.Item) and any(
            mark.name.startswith("lora") for mark in item.iter_markers()
        ):
            from pytest_lora.plugin import mark_checks

            mark_checks.require_valid(item)
    return made


def pytest_itemcollected(item: pytest.Item) -> None:
    """Watch over the shared base in the tests that use it."""
    names = getattr(item, "fixturenames", ())
    if "lora_base_model" in names and "_lora_base_guard" not in names:
        from pytest_lora.plugin import shared_base

        shared_base.guard(item)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Collect adapters where a folder is named that holds no test; skip slow tests; take care of GPU tests."""
    if config.args_source is config.ArgsSource.ARGS:
        named = [os.path.abspath(arg) for arg in config.args if os.path.isdir(arg)]
        without = [one for one in named if not any(str(item.path).startswith(one + os.sep) for item in items)]
        if without:
            from pytest_lora.plugin import adapter_items

            items.extend(adapter_items.in_folders(session, without))
    yield
    slow_tests = [item for item in items if item.get_closest_marker("lora_slow")]
    if slow_tests:
        from pytest_lora.plugin.session_options import options_of

        if not options_of(config).slow:
            skip = pytest.mark.skip(reason="lora_slow: run it with --lora-slow or RUN_SLOW=1")
            for item in slow_tests:
                item.add_marker(skip)
    gpu_tests = [item for item in items if may_use_gpu(item)]
    if gpu_tests:
        from pytest_lora.plugin.gpu import hooks

        hooks.begin(config, gpu_tests)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: Any) -> Generator[None, Any, Any]:
    """Remember which fixture made which base, so that a damaged one can be made anew."""
    value = yield
    if fixturedef.argname == "lora_base_model" or "pytest_lora.plugin.shared_base" in sys.modules:
        from pytest_lora.plugin import shared_base

        shared_base.of(request.config).remember(fixturedef, value)
    return value


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any], request: Any) -> None:
    """Keep no base alive that its fixture let go."""
    if fixturedef.argname == "lora_base_model" and "pytest_lora.plugin.shared_base" in sys.modules:
        from pytest_lora.plugin import shared_base

        shared_base.of(request.config).forget(fixturedef)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forget reports from before this test, of an earlier try or of none, and note who goes unwatched."""
    if "pytest_lora.plugin.shared_base" in sys.modules:
        from pytest_lora.plugin import shared_base

        shared_base.note_start(item)
    if "pytest_lora.assertions" in sys.modules:
        from pytest_lora.plugin import summary

        summary.start(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put what the assertions found on the test's report, in which it travels."""
    if "pytest_lora.assertions" not in sys.modules:
        return (yield)
    from pytest_lora.plugin import summary

    judged = summary.collect(item)
    report = yield
    summary.add_section(report, call, item.config)
    if judged and item.config.getoption("htmlpath", None):  # of pytest-html
        from pytest_lora.plugin import summary

        summary.add_to_page(report, judged, item.config)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """Count the findings of the session by rule, and tell of its GPU tests."""
    reports: dict[str, list[pytest.TestReport]] = {_REPORT: [], GPU_PROPERTY: []}
    for group in terminalreporter.stats.values():
        for report in group:
            for name, told in reports.items():
                if any(recorded(report, name)):
                    told.append(report)
    if reports[_REPORT]:
        from pytest_lora.plugin import summary

        summary.write(terminalreporter, reports[_REPORT])
    if reports[GPU_PROPERTY]:
        from pytest_lora.plugin.gpu import report as gpu_report

        gpu_report.write(terminalreporter, reports[GPU_PROPERTY])
    if any(reports.values()) and ("GITHUB_ACTIONS" in os.environ or "GITHUB_STEP_SUMMARY" in os.environ):
        from pytest_lora.plugin import github

        github.tell(terminalreporter, exitstatus)
