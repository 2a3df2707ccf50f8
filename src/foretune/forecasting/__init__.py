"""Trajectory forecasting: a Forecast-MAE, pretrained on scenes and adapted by Forecast-PEFT."""

# In the folder of a model that Forecast-PEFT adapted: its record, and the tensors it trained.
RECORD_FILE, DELTA_FILE = "forecast_peft.json", "forecast_peft.safetensors"
FORMAT = "foretune-forecast-peft-1"  # of the record
