"""Run an evaluation and write it: report.json, report.md, report.html, plots and predictions, atomically."""

from pathlib import Path

from glm_utils.evaluation.figures import compare
from glm_utils.evaluation.html_page import html_page
from glm_utils.evaluation.job import EvaluationJob
from glm_utils.evaluation.markdown_page import markdown_page
from glm_utils.evaluation.plots import write_plots
from glm_utils.evaluation.predictions import AFTER_NAME, BEFORE_NAME, PROBE_NAME, write_predictions, write_probe
from glm_utils.evaluation.report import Report, make_report, report_values, run_values
from glm_utils.evaluation.sides import run_sides
from glm_utils.files import atomic_files, write_json
from glm_utils.output_dir import lock_directory
from glm_utils.run_record import RUN_CONFIG_NAME


def evaluate(job: EvaluationJob) -> Report:
    """Run both models, compare them and write the report.

    Raises:
        UserError: Another run writes there, a model computes NaN, memory runs out, or the report cannot be written.
    """
    with lock_directory(job.output_dir, "--output_dir"):
        before, after = run_sides(job)
        report = make_report(job, before, after, compare(job, before, after))
        write_evaluation(report)
    return report


def write_evaluation(report: Report) -> None:
    """Write all files into the output directory, run_config.json last.

    Raises:
        UserError: The disk is full, or the directory cannot be written to.
    """
    with atomic_files(report.job.output_dir, last=RUN_CONFIG_NAME, name="--output_dir") as directory:
        write_files(report, directory)


def write_files(report: Report, directory: Path) -> None:
    """Write all files into a directory."""
    job = report.job
    plots = write_plots(directory, report.before, report.after, report.comparison)
    write_predictions(directory / BEFORE_NAME, job.examples, report.before.answers)
    write_predictions(directory / AFTER_NAME, job.examples, report.after.answers)
    if job.probe:
        write_probe(directory / PROBE_NAME, job.probe, report.before.probe_answers, report.after.probe_answers)
    write_json(directory / "report.json", report_values(report))
    (directory / "report.md").write_text(markdown_page(report, [path.name for path in plots]), encoding="utf-8")
    (directory / "report.html").write_text(html_page(report, plots), encoding="utf-8")
    write_json(directory / RUN_CONFIG_NAME, run_values(job))
