//! The user's terminal while the guest's serial port has it.

use std::io::{IsTerminal as _, stdin};

use nix::sys::termios::{
    InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices, tcgetattr, tcsetattr,
};

/// How the terminal is set while the VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// Ctrl-C and its like are signals to the launcher, not bytes for the guest.
    pub signals: bool,
}

impl Terminal {
    /// Passes every byte on as it is typed. The guard gives the old modes back at the end.
    pub fn set(self) {
        if !stdin().is_terminal() {
            return;
        }
        let Ok(mut modes) = tcgetattr(stdin()) else { return };
        modes.input_flags &= !(InputFlags::IGNBRK
            | InputFlags::BRKINT
            | InputFlags::PARMRK
            | InputFlags::ISTRIP
            | InputFlags::INLCR
            | InputFlags::IGNCR
            | InputFlags::ICRNL
            | InputFlags::IXON);
        modes.output_flags |= OutputFlags::OPOST;
        modes.local_flags &=
            !(LocalFlags::ECHO | LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::IEXTEN);
        modes.local_flags.set(LocalFlags::ISIG, self.signals);
        // The console is in a session of its own: a stopped launcher would leave it reading the keys.
        if let Some(key) = modes.control_chars.get_mut(SpecialCharacterIndices::VSUSP as usize) {
            *key = libc::_POSIX_VDISABLE;
        }
        // A terminal that refuses is used as it is.
        let _ = tcsetattr(stdin(), SetArg::TCSANOW, &modes);
    }
}
