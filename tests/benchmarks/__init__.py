from quantkit.system.threads import spin_briefly

spin_briefly()  # as the command line does, before any of them imports torch
