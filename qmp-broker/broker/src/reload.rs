//! What the opener sends: another configuration while the broker runs, of which counts who may connect, and with which
//! role; and answers.

use std::os::fd::AsFd as _;
use std::rc::Rc;

use bulkhead_control_api::opener::FromOpener;
use bulkhead_control_api::{MAX_MESSAGE, config, decode};
use bulkhead_jail::link::{LinkError, recv_packet};
use bulkhead_jail::start::read_config;
use bulkhead_jail::{info, notice, warn};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

use crate::hub::Hub;
use crate::policy::Policy;

/// Takes messages from the opener until its link ends.
pub async fn follow(hub: Rc<Hub>) {
    let Some(opener) = hub.opener.link() else { return };
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let Ok(mut guard) = opener.readable().await else { return };
        let (length, fds) = match recv_packet(opener.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Err(LinkError::WouldBlock) => {
                guard.clear_ready();
                continue;
            }
            Ok((0, _)) | Err(_) => {
                info!(
                    "the opener is gone; the configuration stays as it is until this process is started anew"
                );
                hub.opener.end();
                return;
            }
            Ok(received) => received,
        };
        let message = decode::<FromOpener>(buffer.get(..length).unwrap_or_default());
        match (message, fds.into_iter().next()) {
            (Ok(FromOpener::Given { name }), Some(fd)) if name == "config" => {
                match read_config::<config::Broker>(fd.as_fd()) {
                    Ok(config) => {
                        hub.set_policy(Policy::new(&config.monitors));
                        notice!("the policy is that of the new configuration");
                    }
                    Err(error) => warn!("new {error}; the policy stays as it is"),
                }
            }
            (Ok(FromOpener::Given { name }), Some(fd)) => hub.opener.answer(&name, Ok(Some(fd))),
            (Ok(FromOpener::Defined { name }), None) => hub.opener.answer(&name, Ok(None)),
            (Ok(FromOpener::NotGiven { name, errno }), None) => {
                hub.opener.answer(&name, Err(Errno::from_raw(errno)));
            }
            _ => warn!("opener: a message that is not for this process"),
        }
    }
}
