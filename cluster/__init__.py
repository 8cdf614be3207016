"""Launchers (debug, local, ray, mpi), legal world sizes, job submission: runs any callable, knows no other room."""
