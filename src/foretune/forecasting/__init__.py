"""Trajectory forecasting: a Forecast-MAE, pretrained on scenes and adapted by Forecast-PEFT."""

RECORD_FILE, DELTA_FILE = "forecast_peft.json", "forecast_peft.safetensors"
FORMAT = "foretune-forecast-peft-1"  # of these two
