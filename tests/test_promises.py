"""Every sentence of the README's "What is promised" stands on tests, which are named here."""

import re

import pytest
from conftest import ROOT

PROMISES = {  # how a sentence begins → the tests that it stands on
    "A killed or interrupted command leaves": """
        test_prepare.test_processes_and_killing_do_not_change_a_byte
        test_engine.test_killed_at_any_moment_and_resumed_is_the_unbroken_run
        test_apply.test_killed_at_any_moment_the_same_command_finishes_the_rest
        test_prepare_edges.test_a_signal_ends_in_a_command_without_tracebacks
        test_engine.test_control_c_finishes_the_batch_and_goes_on_from_there
        test_apply_inputs.test_an_error_stops_one_case_and_an_interrupt_all
        test_settings.test_a_signal_ends_a_script_with_130_and_what_to_do
    """,
    "A full disk ends": """
        test_prepare.test_a_full_disk_stops_with_a_message_and_keeps_finished_cases
        test_prepare_edges.test_a_full_disk_is_no_verdict_on_a_scan
        test_settings.test_any_writers_failure_is_one_message_and_leaves_nothing
        test_visualize_3d.test_a_full_disk_leaves_nothing_behind
        test_runs.test_a_full_disk_ends_a_training_in_one_message
    """,
    "A second process": """
        test_prepare_edges.test_a_second_prepare_into_a_folder_is_refused
        test_settings.test_a_second_training_into_a_run_folder_is_refused
        test_apply_inputs.test_two_processes_do_not_write_into_one_folder
    """,
    "A bad file stops": """
        test_prepare_check.test_orphans_and_broken_files_stop_their_case_only
        test_prepare_edges.test_whatever_a_case_raises_the_others_are_done
        test_apply.test_a_broken_scan_stops_nothing_and_finished_ones_are_skipped
        test_evaluation.test_a_case_that_fails_is_named_and_the_others_go_on
        test_visualize_3d.test_of_several_cases_the_sound_ones_are_drawn
    """,
    "A checkpoint from a stranger": """
        test_training.test_a_checkpoint_cannot_run_code
        test_runs.test_one_flipped_bit_is_refused_by_name
    """,
    "Nothing but geometry": """
        test_volumes.test_no_text_of_the_input_is_written
        test_dicom_scripts.test_series_with_seg_and_nifti_labels_are_prepared_and_nothing_private_is_written
        test_dicom_seg.test_a_dicom_seg_says_what_it_is_and_where
    """,
    "Nothing is deleted": """
        test_prepare_edges.test_another_source_is_refused_and_overwrite_removes_only_ours
        test_prepare_edges.test_a_folder_that_is_not_ours_is_not_replaced
        test_prepare_edges.test_only_leftovers_of_killed_runs_are_removed
    """,
}


def read_sentences() -> list[str]:
    """Of the paragraph, in one line each."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraph = " ".join(text.partition("## What is promised\n")[2].partition("\n## ")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)


def test_every_sentence_has_its_tests_and_every_test_its_sentence():
    sentences = read_sentences()
    assert len(sentences) == len(PROMISES), sentences
    for sentence, begin in zip(sentences, PROMISES, strict=True):
        assert sentence.startswith(begin), sentence


@pytest.mark.parametrize("begin", PROMISES)
def test_the_tests_that_a_sentence_stands_on_are_there(begin):
    names = PROMISES[begin].split()
    assert names
    for name in names:
        file, _, function = name.partition(".")
        code = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        found = re.search(rf"((?:^@.*\n(?:^[ )].*\n)*)*)^def {function}\(", code, re.MULTILINE)
        assert found, f"{name} is gone: find another one, or take the promise back"
        assert "mark.skip(" not in found[1], f"{name} is not run"
