"""Trajectory forecasting: Forecast-MAE and Forecast-PEFT. A wing."""
