//! systemd: install, restart, uninstall, on a real one.

use crate::case::{Case, Needs};
use crate::container::Container;
use crate::lab::Net;
use crate::nat::Nat;

pub(crate) fn cases() -> Vec<Case> {
    vec![Case::new("service::a_container_boots_and_has_the_program", boots).needs(Needs::Systemd)]
}

fn boots() {
    let net = Net::new();
    let host = net.machine("box", Nat::None);
    let other = net.machine("box2", Nat::None);
    let a = Container::boot(&net, &host);
    let b = Container::boot(&net, &other);
    for container in [&a, &b] {
        container.ok(&["test", "-x", "/usr/local/bin/overlay"]);
        container.ok(&["test", "-c", "/dev/net/tun"]);
        assert_eq!(container.ok(&["systemctl", "--failed", "--quiet"]), "", "failed units");
        eprintln!("{}", container.ok(&["hostname"]));
    }
}
