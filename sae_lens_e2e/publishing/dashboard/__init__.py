"""Feature dashboards by SAEDashboard, which Neuronpedia shows, for SAEs and language models that may be on this machine only."""

from sae_lens_e2e.publishing.dashboard.run import make_dashboard

__all__ = ["make_dashboard"]
