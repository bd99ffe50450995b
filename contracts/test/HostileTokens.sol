// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// Takes one percent of every transfer.
contract FeeToken is ERC20("fee", "FEE") {
    constructor() {
        _mint(msg.sender, 1e30);
    }

    function _update(address from, address to, uint256 value) internal override {
        if (from == address(0)) return super._update(from, to, value);
        super._update(from, to, value - value / 100);
        super._update(from, address(0xFEE), value / 100);
    }
}

/// Calls back into whoever moves it, once armed, from inside the transfer.
contract ReentrantToken is ERC20("again", "AGN") {
    address public target;
    bytes public payload;
    bool public succeeded;
    bytes public answer;

    constructor() {
        _mint(msg.sender, 1e30);
    }

    function arm(address target_, bytes calldata payload_) external {
        (target, payload) = (target_, payload_);
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (target != address(0)) {
            address target_ = target;
            target = address(0);
            (succeeded, answer) = target_.call(payload);
        }
    }
}

/// Refuses to pay one address.
contract BlacklistToken is ERC20("no", "NO") {
    address public refused;

    error Refused(address who);

    constructor() {
        _mint(msg.sender, 1e30);
    }

    function refuse(address who) external {
        refused = who;
    }

    function _update(address from, address to, uint256 value) internal override {
        if (to == refused && to != address(0)) revert Refused(to);
        super._update(from, to, value);
    }
}
