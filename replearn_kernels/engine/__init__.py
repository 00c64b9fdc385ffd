"""The engine: tiles, sweeps, schedules, backends and the operators. It knows no loss."""
