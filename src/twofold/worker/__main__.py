"""The process of a rank. Python looks for no garbage while it imports: that took a fifth of the time."""

import gc

if __name__ == "__main__":
    gc.disable()
    from twofold.worker.worker import main

    gc.freeze()
    gc.enable()
    main()
