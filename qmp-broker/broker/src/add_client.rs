//! `add_client`: a named descriptor becomes the client of a character device of the console.

use std::os::fd::OwnedFd;

use bulkhead_control_api::console::{Answer, Client, MAX_CHARDEV, Op, Request};
use bulkhead_qapi::Error;
use bulkhead_qapi::types::misc::AddClientArg;
use nix::sys::socket::{SockType, getsockopt, sockopt};
use serde_json::json;

use crate::commands::Reply;
use crate::hub::{Hub, away};

impl Hub {
    /// Executes the command for a client of `monitor`. The descriptor is closed here whatever follows:
    /// the console alone holds one that it took.
    pub(crate) async fn add_client(&self, args: AddClientArg, monitor: &str) -> Reply {
        let named = self.descriptors.borrow_mut().take_named(monitor, &args.fdname);
        let fd = named.ok_or_else(|| {
            Error::generic(format!("File descriptor named '{}' has not been found", args.fdname))
        })?;
        // Before the console has it: nobody else is to.
        self.commit().await;
        match args.protocol.as_str() {
            "spice" => Err(Error::device_not_active("SPICE is not in use")),
            // QEMU's answer without a display; `skipauth` and `tls` concern displays only.
            "vnc" => Ok(json!({})),
            // Its clients' credentials are asked when they connect: nobody else comes in.
            chardev if self.monitors.iter().any(|monitor| monitor.label == chardev) => Err(refused()),
            chardev if chardev.len() > MAX_CHARDEV => Err(invalid(chardev)),
            chardev => self.hand_to_console(chardev, fd).await,
        }
    }

    async fn hand_to_console(&self, chardev: &str, fd: OwnedFd) -> Reply {
        // Closing a file can take its file system's time, and that is not to be the console's: it gets
        // sockets only. What it does not want to hear of is found out all the same, so that an unknown
        // name is told first.
        let fd = Some(fd).filter(|fd| matches!(getsockopt(fd, sockopt::SockType), Ok(SockType::Stream)));
        let op = Op::AddClient { chardev: chardev.to_owned() };
        let answer = self.console.ask_with(|id| Request { id, op }, fd).await;
        match answer.map_err(|error| away("The console", error))? {
            Answer::Client(Client::Added) => Ok(json!({})),
            Answer::Client(Client::Refused) => Err(refused()),
            Answer::Client(Client::NoChardev) => Err(invalid(chardev)),
            Answer::Done | Answer::Chardevs(_) => Err(Error::generic("the console answered something else")),
        }
    }
}

fn refused() -> Error {
    Error::generic("failed to add client")
}

fn invalid(protocol: &str) -> Error {
    Error::generic(format!("protocol '{protocol}' is invalid"))
}
