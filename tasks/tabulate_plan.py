"""What a plan and a calibration look like as tables: pure functions of records."""

from __future__ import annotations

from tasks.records import CalibrationReport, PlanReport
from tasks.tables import Column, Table


def tabulate_plan(plan: PlanReport) -> Table:
    """One row: the plan for the chosen model."""
    columns = [
        Column("model", "model", "text"),
        Column("documents", "documents"),
        Column("nodes", "nodes"),
        Column("tokens", "tokens"),
        Column("longest_tokens", "longest node"),
        Column("partitions", "partitions"),
        Column("micro_batches", "micro-batches"),
        Column("unmasked_token_fraction", "tokens without mask", "fraction"),
        Column("padding_fraction", "padding", "fraction"),
        Column("weights_bytes", "weights", "bytes"),
        Column("budget_bytes", "budget", "bytes"),
        Column("predicted_peak_bytes", "predicted peak", "bytes"),
        Column("spilled_nodes", "would spill"),
        Column("memory_model", "memory model", "text"),
    ]
    return Table("plan", "Plan", columns, [[getattr(plan, column.key) for column in columns]])


def tabulate_models(plan: PlanReport) -> Table:
    """The models side by side, by their public shapes."""
    columns = [
        Column("model", "model", "text"),
        Column("parameters", "parameters", "text"),
        Column("weights_bytes", "weights", "bytes"),
        Column("fits", "fits", "text"),
        Column("max_tokens", "max tokens"),
        Column("largest_batch", "largest batch of longest"),
        Column("spilled_nodes", "would spill"),
        Column("relative_cost", "cost", "factor"),
    ]
    rows = [
        (
            fit.model,
            f"{fit.parameters / 1e6:.0f}M",
            fit.weights_bytes,
            fit.fits,
            fit.max_tokens,
            fit.largest_batch,
            fit.spilled_nodes,
            round(fit.relative_cost, 4),
        )
        for fit in plan.models
    ]
    return Table("model", "Models side by side", columns, rows)


def tabulate_calibration(report: CalibrationReport) -> Table:
    """One row: the fitted model's key, its error and the device's speed."""
    columns = [
        Column("device", "device", "text"),
        Column("device_total_bytes", "device memory", "bytes"),
        Column("precision", "precision", "text"),
        Column("attention", "attention", "text"),
        Column("probes", "probes"),
        Column("median_error", "median error", "fraction"),
        Column("worst_under", "worst under", "fraction"),
        Column("tokens_per_s", "tokens/s", "rate"),
        Column("seconds", "time", "seconds"),
    ]
    key = report.key
    row = (
        key.device_name,
        key.device_total_bytes,
        key.precision,
        key.attention,
        len(report.samples),
        report.median_error,
        report.worst_under,
        report.tokens_per_s,
        report.seconds,
    )
    return Table("calibration", "Calibration", columns, [row])


def tabulate_coefficients(report: CalibrationReport) -> Table:
    """The fitted coefficients of peak = c0 + c1 b s + c2 b s^2, bytes."""
    columns = [Column("name", "coefficient", "text"), Column("value", "bytes", "coefficient")]
    return Table("coefficient", "peak = c0 + c1 b s + c2 b s^2", columns, list(report.coefficients.items()))


def tabulate_probes(report: CalibrationReport) -> Table:
    """The held-back probes: measured against predicted."""
    columns = [
        Column("nodes", "batch"),
        Column("padded_tokens", "padded tokens"),
        Column("masked", "masked", "text"),
        Column("peak_bytes", "measured", "bytes"),
        Column("predicted_bytes", "predicted", "bytes"),
        Column("error", "error", "fraction"),
    ]
    rows = [
        (
            probe.nodes,
            probe.padded_tokens,
            probe.masked,
            probe.peak_bytes,
            predicted,
            predicted / probe.peak_bytes - 1 if probe.peak_bytes else None,
        )
        for probe, predicted in zip(report.held_back, report.held_back_predictions, strict=True)
    ]
    return Table("held_back", "Held-back probes", columns, rows)
