"""Trajectory forecasting: a Forecast-MAE, pretrained on scenes and adapted by Forecast-PEFT."""
