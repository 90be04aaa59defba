from orchestrator.testing import check_modality
from orchestrator_sensor import modality


def test_it_keeps_the_contract_and_trains() -> None:
    check_modality(modality, backbone={"model_type": "sensor-cnn", "channels": 3, "width": 16})
