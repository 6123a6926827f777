"""What every stage needs: errors, tables, files, logs, seeds, devices, provenance."""
