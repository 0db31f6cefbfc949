"""Reports on a plan: counts, latency, the printed report, pictures, and the zoo's coverage.

The command line uses ``count_costs`` (count), ``measure_latency`` (latency), ``print_report`` and
``report_dict`` (summary), ``block_code`` (code), ``plot_costs`` and ``time_sites`` (plot),
``draw_block`` (diagram), ``measure_savings`` (saved), and zoo with coverage. Fine-tuning uses
``count_model``.
"""
