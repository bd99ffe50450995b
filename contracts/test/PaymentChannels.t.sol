// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MarketToken} from "../src/MarketToken.sol";
import {PaymentChannels} from "../src/PaymentChannels.sol";
import {Base} from "./Base.sol";

contract PaymentChannelsTest is Base {
    uint256 private constant SIGNER_KEY = 0xA11CE;
    uint256 private constant PAYEE_KEY = 0xB0B;
    uint40 private constant WINDOW = 600;
    uint40 private constant FAR = 1e12;

    address private payer = address(0x1001);
    address private payee;
    address private signer;
    MarketToken private token;
    PaymentChannels private channels;

    function setUp() public {
        vm.chainId(31337);
        vm.warp(1_000_000);
        (payee, signer) = (vm.addr(PAYEE_KEY), vm.addr(SIGNER_KEY));
        token = new MarketToken();
        channels = new PaymentChannels(IERC20(address(token)), WINDOW, address(0), 0, 0);
        _fund(token, payer, address(channels), 10);
    }

    function _open(uint96 amount) private returns (bytes32 id) {
        vm.prank(payer);
        id = channels.open(payee, signer, amount, FAR);
    }

    function _redeem(bytes32 id, uint96 cumulative) private {
        channels.redeem(id, cumulative, _signature(SIGNER_KEY, channels.voucherDigest(id, cumulative)));
    }

    function testFuzz_redeem_pays_exactly_what_was_signed(uint96 deposit, uint96 first, uint96 second) public {
        deposit = uint96(_bound(deposit, 2, 1e22));
        first = uint96(_bound(first, 1, deposit - 1));
        second = uint96(_bound(second, first + 1, deposit));
        bytes32 id = _open(deposit);
        _redeem(id, first);
        _eq(token.balanceOf(payee), first, "first");
        _redeem(id, second);
        _eq(token.balanceOf(payee), second, "second");
        _eq(token.balanceOf(address(channels)), deposit - second, "left");
    }

    function testFuzz_redeem_above_the_deposit_reverts(uint96 deposit, uint96 cumulative) public {
        deposit = uint96(_bound(deposit, 1, 1e22));
        cumulative = uint96(_bound(cumulative, uint256(deposit) + 1, type(uint96).max));
        bytes32 id = _open(deposit);
        bytes memory signature = _signature(SIGNER_KEY, channels.voucherDigest(id, cumulative));
        vm.expectRevert(abi.encodeWithSelector(PaymentChannels.AboveDeposit.selector, id, cumulative, deposit));
        channels.redeem(id, cumulative, signature);
    }

    function testFuzz_redeem_of_a_forged_voucher_reverts(uint256 key, uint96 cumulative) public {
        key = _bound(key, 1, type(uint128).max);
        vm.assume(key != SIGNER_KEY);
        bytes32 id = _open(1e20);
        cumulative = uint96(_bound(cumulative, 1, 1e20));
        bytes memory signature = _signature(key, channels.voucherDigest(id, cumulative));
        vm.expectRevert(abi.encodeWithSelector(PaymentChannels.NotSigner.selector, id, vm.addr(key)));
        channels.redeem(id, cumulative, signature);
    }

    function testFuzz_redeemMany_of_garbage_pays_nothing(bytes32 r, bytes32 vs, uint96 cumulative) public {
        PaymentChannels.Claim[] memory claims = new PaymentChannels.Claim[](2);
        bytes32 id = _open(1e20);
        claims[0] = PaymentChannels.Claim(id, cumulative, r, vs);
        claims[1] = PaymentChannels.Claim(bytes32(uint256(1)), cumulative, r, vs);
        channels.redeemMany(claims);
        _eq(channels.credited(payee), 0, "credited");
        _eq(channels.channel(id).claimed, 0, "claimed");
    }

    function testFuzz_closed_channel_never_pays_again_and_its_id_never_recurs(uint96 cumulative) public {
        bytes32 id = _open(1e20);
        cumulative = uint96(_bound(cumulative, 1, 1e20));
        bytes memory signature = _signature(SIGNER_KEY, channels.voucherDigest(id, cumulative));
        vm.warp(FAR);
        vm.prank(payer);
        channels.close(id);
        vm.expectRevert(abi.encodeWithSelector(PaymentChannels.UnknownChannel.selector, id));
        channels.redeem(id, cumulative, signature);
        vm.prank(payer);
        _true(channels.open(payee, signer, 1e20, FAR + 1) != id, "id recurs");
    }

    function testFuzz_payer_gets_out_within_the_window_whatever_was_claimed(uint96 deposit, uint96 claimed) public {
        deposit = uint96(_bound(deposit, 1, 1e22));
        claimed = uint96(_bound(claimed, 0, deposit));
        bytes32 id = _open(deposit);
        if (claimed != 0) _redeem(id, claimed);
        uint256 before = token.balanceOf(payer);
        vm.startPrank(payer);
        channels.requestClose(id);
        vm.warp(block.timestamp + WINDOW);
        channels.close(id);
        vm.stopPrank();
        _eq(token.balanceOf(payer) - before, deposit - claimed, "refund");
    }

    /// Tokens sent here by mistake, or to confuse, stay: nobody is paid less or more.
    function testFuzz_donation_is_nobodys_and_changes_no_claim(uint96 deposit, uint96 claimed, uint96 donated) public {
        deposit = uint96(_bound(deposit, 1, 1e22));
        claimed = uint96(_bound(claimed, 1, deposit));
        donated = uint96(_bound(donated, 1, 1e22));
        bytes32 id = _open(deposit);
        token.faucet(address(this));
        token.transfer(address(channels), donated);
        _redeem(id, claimed);
        _eq(token.balanceOf(payee), claimed, "payee");
        uint256 before = token.balanceOf(payer);
        vm.startPrank(payer);
        channels.requestClose(id);
        vm.warp(block.timestamp + WINDOW);
        channels.close(id);
        vm.stopPrank();
        _eq(token.balanceOf(payer) - before, deposit - claimed, "payer");
        _eq(token.balanceOf(address(channels)), donated, "stays");
    }
}
