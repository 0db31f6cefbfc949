"""What a plan costs and shows: counts, latency, the printed report, code, the zoo's coverage.

The command line uses ``count_costs`` (count), ``measure_latency`` (latency), ``print_report`` and
``report_dict`` (summary), ``block_code`` (code), and zoo with coverage. Fine-tuning uses
``count_model``.
"""
