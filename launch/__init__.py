"""The command line, the one configuration, the train loop, telemetry and reports. It knows all other rooms."""
